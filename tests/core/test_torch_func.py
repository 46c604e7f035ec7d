"""torch.func over the public functions: gradients of samples, of shared tensors, Jacobians; forward mode is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from checks import BACKENDS
from public_calls import CALLS, Given, given
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import kldiv_kernels as kk


def _close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert expected.any()
    torch.testing.assert_close(got.double(), expected.double(), rtol=2e-5, atol=2e-5 * expected.abs().max().item())


def _of(function: Callable[[Given], Tensor], **options: str) -> Callable[..., Tensor]:
    """A scalar of the tensors, the logits first."""
    return lambda logits, *rest: function(Given(logits, *rest), **options).sum()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_samples(name: str, backend: str) -> None:
    ours, definition = _of(CALLS[name].ours, backend=backend), _of(CALLS[name].definition)
    x = given(4, 5)
    expected = vmap(grad(definition))(*x)
    _close(vmap(grad(ours))(*x), expected)
    _close(grad(lambda *x: vmap(ours)(*x).sum())(*x), expected)
    _close(vmap(ours)(*x), vmap(definition)(*x))
    leaf = x.logits.clone().requires_grad_()
    vmap(ours)(leaf, *x[1:]).sum().backward()
    _close(leaf.grad, expected)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_transforms(name: str, backend: str) -> None:
    """One call; samples along other dimensions, and two batches of them; one batch of rows shared by all samples."""
    ours, definition = _of(CALLS[name].ours, backend=backend), _of(CALLS[name].definition)
    x = given(4, 5)
    expected = grad(definition)(*x)
    _close(grad(ours)(*x), expected)
    value, pull = vjp(lambda logits: ours(logits, *x[1:]), x.logits)
    _close(value, definition(*x))
    _close(pull(torch.tensor(-3.0))[0], -3 * expected)

    def each(function: Callable[..., Tensor], *, twice: bool = False) -> Callable[..., Tensor]:
        return vmap(vmap(grad(function))) if twice else vmap(grad(function), (1, 0, *(0 for _ in x[2:])), 1)

    _close(each(ours)(x.logits.movedim(0, 1), *x[1:]), each(definition)(x.logits.movedim(0, 1), *x[1:]))
    y = given(2, 3, 5)
    _close(each(ours, twice=True)(*y), each(definition, twice=True)(*y))
    several = x.logits.detach() + torch.randn(3, *x.logits.shape)
    shared = [vmap(grad(f), (0, *(None for _ in x[1:])))(several, *x[1:]) for f in (ours, definition)]
    _close(*shared)


@pytest.mark.parametrize("backend", BACKENDS)
def test_jacobians_and_the_teacher(backend: str) -> None:
    x = given(2, 3)
    each = CALLS["divergence_loss, each token"]
    _close(
        jacrev(lambda logits: each.ours(x._replace(logits=logits), backend=backend))(x.logits),
        jacrev(lambda logits: each.definition(x._replace(logits=logits)))(x.logits),
    )
    for samples in (True, False):
        found = []
        for f in (_of(CALLS["token_stats"].ours, backend=backend), _of(CALLS["token_stats"].definition)):
            both = grad(f, (0, 1))
            found.append((vmap(both) if samples else both)(*x))
        for got, expected in zip(*found, strict=True):
            _close(got, expected)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_several_upstream_gradients_at_once(name: str, backend: str) -> None:
    """Backward under vmap, of a graph that was made without: of the forms that read the logits once, too."""
    x = given(2, 5)
    leaf = x.logits.clone().requires_grad_()
    value = CALLS[name].ours(x._replace(logits=leaf), backend=backend)
    upstream = torch.randn(3, *value.shape)
    (got,) = torch.autograd.grad(value, leaf, upstream, is_grads_batched=True, retain_graph=True)
    exact = x.logits.double().requires_grad_()
    expected = CALLS[name].definition(x._replace(logits=exact))
    expected = torch.stack([torch.autograd.grad(expected, exact, u.double(), retain_graph=True)[0] for u in upstream])
    _close(got, expected)
    _close(vmap(lambda u: torch.autograd.grad(value, leaf, u)[0])(upstream), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_a_models_parameters(backend: str) -> None:
    """A sample each, as for differentially private training; masked samples of no token have none."""
    model = torch.nn.Linear(6, 13)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    hidden, x = torch.randn(4, 5, 6), given(4, 5)
    x.mask[1] = False

    def loss(parameters: dict[str, Tensor], hidden: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        logits = functional_call(model, parameters, (hidden,))
        return kk.forward_kl(logits, teacher, mask=mask, backend=backend)

    got = vmap(grad(loss), (None, 0, 0, 0))(parameters, hidden, x.teacher, x.mask)
    for i in range(4):
        exact = torch.nn.Linear(6, 13).double()
        exact.load_state_dict(model.state_dict())
        logq, logp = exact(hidden[i].double()).log_softmax(-1), x.teacher[i].double().log_softmax(-1)
        kl = ((logp.exp() * (logp - logq)).sum(-1) * x.mask[i]).sum() / max(1, int(x.mask[i].sum()))
        kl.backward()
        for name, p in exact.named_parameters():
            if i == 1:
                assert not got[name][i].any()
            else:
                _close(got[name][i], p.grad)


FORWARD = {
    "jvp": lambda f, x: jvp(f, (x,), (torch.ones_like(x),)),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "hessian": lambda f, x: hessian(f)(x),
    "jvp of samples": lambda f, x: jvp(vmap(f), (x[None],), (torch.ones_like(x)[None],)),
}


@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_is_refused(name: str) -> None:
    x = given(2, 5)
    f = _of(CALLS[name].ours)
    for transform in FORWARD.values():
        with pytest.raises(NotImplementedError, match=r"forward-mode .* is not supported here; use reverse mode"):
            transform(lambda logits: f(logits, *x[1:]), x.logits)
    for requires_grad in (False, True):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.logits.clone().requires_grad_(requires_grad), torch.ones_like(x.logits))
            with pytest.raises(NotImplementedError, match=r"logits has a tangent; .*use reverse mode"):
                f(dual, *x[1:])


def test_forward_mode_of_what_is_not_the_logits() -> None:
    """By a weight it is PyTorch's own; by a temperature it would be lost."""
    x = given(2, 5)
    values = kk.divergence_loss(x.logits, x.teacher, reduction="none")
    with forward_ad.dual_level():
        weight = forward_ad.make_dual(x.weight, torch.ones_like(x.weight))
        loss = kk.divergence_loss(x.logits.clone().requires_grad_(), x.teacher, weight=weight)
        _close(forward_ad.unpack_dual(loss).tangent, values.mean())
        temperature = forward_ad.make_dual(x.temperature, torch.ones_like(x.temperature))
        with pytest.raises(NotImplementedError, match="token_stats: temperature has a tangent"):
            kk.entropy(x.logits, temperature=temperature)


def test_no_gradient_of_a_temperature() -> None:
    x = given(2, 5)
    of_rows = _of(CALLS["entropy"].ours)
    for f in (of_rows, lambda *x: vmap(of_rows)(*x).sum()):
        with pytest.raises(ValueError, match=r"temperature.* requires grad; gradients flow to the logits only"):
            grad(f, Given._fields.index("temperature"))(*x)


@pytest.mark.parametrize("name", ["divergence_loss", "token_stats", "policy_loss", "topk_divergence_loss"])
def test_second_derivatives_are_refused(name: str) -> None:
    x = given(2, 5)
    f = _of(CALLS[name].ours)
    for second in (lambda g: grad(lambda *y: g(*y).square().sum()), lambda g: jacrev(g)):
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            second(grad(f))(*x)


@pytest.mark.parametrize("name", ["divergence_loss", "entropy"])
def test_compiled(name: str) -> None:
    x = given(3, 5)
    transform = vmap(grad(_of(CALLS[name].ours)))
    torch._dynamo.reset()
    _close(torch.compile(transform)(*x), transform(*x))
