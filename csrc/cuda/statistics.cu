// The statistics by name, and what each of them asks for.
#include <algorithm>

#include "row/row.cuh"

namespace kldiv::gpu {

namespace {

struct Named {
    const char* name;
    int code;
};
constexpr Named kNames[] = {{"logprob", kLogprob},
                            {"reference_logprob", kReferenceLogprob},
                            {"untempered_logprob", kUntemperedLogprob},
                            {"tail_logprob", kTailLogprob},
                            {"logsumexp", kLogsumexp},
                            {"max_logprob", kMaxLogprob},
                            {"argmax", kArgmaxCode},
#define KLDIV_NAME(name, D) {#name, k_##name},
                            KLDIV_DIVERGENCES(KLDIV_NAME)
#undef KLDIV_NAME
};

}  // namespace

const char* statistic_name(int code) {
    for (const Named& named : kNames)
        if (named.code == code) return named.name;
    return "";
}

int statistic_code(const std::string& name) {
    for (const Named& named : kNames)
        if (name == named.name) return named.code;
    return -1;
}

std::vector<std::string> statistic_names() {
    std::vector<std::string> names;
    for (const Named& named : kNames)
        if (named.code != k_alpha_below_half) names.emplace_back(named.name);
    return names;
}

bool needs_labels(int code) { return per_label(code) || code == kTailLogprob; }

bool needs_reference(int code) {
    switch (code) {
        case kReferenceLogprob:
            return true;
#define KLDIV_CASE(name, ...) \
    case k_##name:            \
        return __VA_ARGS__::needs_p;
            KLDIV_DIVERGENCES(KLDIV_CASE)
#undef KLDIV_CASE
        default:
            return false;
    }
}

bool compares_two(int code) { return code > k_entropy && code != k_reference_entropy && needs_reference(code); }

int64_t value_rows(const Job& job, int stats) {
    const int64_t labelled = std::count_if(job.stats, job.stats + stats, per_label);
    return stats + labelled * (job.labels_per_row - 1);
}

}  // namespace kldiv::gpu
