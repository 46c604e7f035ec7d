"""All cases of the adapters that need several ranks, for processes that are started once."""

from __future__ import annotations

import megatron_cases
import nemo_rl_cases
import torchtitan_cases

for _module in (megatron_cases, nemo_rl_cases, torchtitan_cases):
    globals().update({name: case for name, case in vars(_module).items() if name.startswith("case_")})
