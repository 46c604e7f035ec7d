// The kernels with one call left out, on small problems and in many orders of threads: the bits must be those that
// all calls give with threads in turn.
//
//   mutant_test MUTANT FIRST_SEED SEEDS PROBLEMS [stop]
//
// MUTANT is a number of mutations.py, or -1; PROBLEMS are a group of `problems_of`. A line for each seed that shows
// something wrong, until the first with `stop`. Each runs in a process of its own, which a mutant may break.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <stdexcept>

#include "cuda/one_read/kernels.h"
#include "cuda/one_read/topk_kernel.cuh"
#include "mutant.h"
#include "mutant_problems.h"

namespace kldiv::gpu {

namespace host {
int mutant = -1;
}

// What the problems take: each one-read kernel costs seconds to compile.
OneReadKernel one_read_float32(int code) {
    return code == k_entropy ? one_read<Entropy, kFloat32> : code == k_js ? one_read<JensenShannon, kFloat32> : nullptr;
}
OneReadKernel one_read_bfloat16(int code) {
    return code == k_forward_kl ? one_read<ForwardKl, kBfloat16>
           : code == k_js       ? one_read<JensenShannon, kBfloat16>
                                : nullptr;
}
OneReadKernel one_read_float16(int) { return nullptr; }
TopKKernel one_read_topk_kernel(int) { return one_read_topk<kBfloat16>; }

namespace {

constexpr int kRight = 0, kWrong = 1;
constexpr unsigned kMostSeconds = 60;

std::vector<Problem> problems_of(const std::string& group) {
    std::vector<Problem> all;
    const auto add = [&](Problem problem, const auto& change) {
        change(problem);
        all.push_back(std::move(problem));
    };
    const Problem js = {"js", {"js"}, "cluster=2,stages=2"};
    const Problem kl = {"forward_kl", {"forward_kl"}, "cluster=4,stages=3"};
    const Problem student = {"of the student", {"entropy", "logprob", "logsumexp"}, "cluster=2,stages=2"};
    const Problem sums = {"sums", {"js", "tvd", "jeffreys", "triangular", "cross_entropy"}, "two-sweep"};
    const Problem many = {"two sweeps",
                          {"js", "forward_kl", "tvd", "entropy", "logprob", "reference_logprob", "untempered_logprob"},
                          "two-sweep"};
    const Problem labels = {"labels", {"logprob", "tail_logprob", "entropy", "untempered_logprob"}, "two-sweep"};
    const Problem topk = {"top-k", {"logprob", "tail_logprob"}, "cluster=2,stages=2"};
    const auto alone = [](Problem& p) { p.teacher = false, p.element = kFloat32; };
    if (group == "orders") {
        add(many, [](Problem& p) { p.rows = 2, p.columns = 16400, p.teacher_gradient = true; });
        add(sums, [](Problem& p) { p.rows = 12, p.columns = 504; });
        add(labels, [](Problem& p) { p.teacher = false, p.columns = 3000, p.labels_per_row = 300, p.repeated = 2; });
        add(js, [](Problem& p) { p.rows = 7; });
        add(kl, [](Problem& p) { p.rows = 9, p.mask = p.exclude = true; });
        add(kl, [](Problem& p) { p.name = "forward_kl, one stage", p.plan = "cluster=2,stages=1"; });
        add(student, alone);
        add(topk, [](Problem& p) { p.teacher = false, p.topk = "js", p.rows = 7, p.labels_per_row = 90; });
        add(topk, [](Problem& p) {
            p.name = "top-k, labels twice", p.plan = "cluster=4,stages=3", p.teacher = false, p.topk = "forward_kl";
            p.rows = 9, p.mask = true, p.labels_per_row = 600, p.repeated = 2;
        });
        add(js, [](Problem& p) { p.name = "js, float32", p.element = kFloat32, p.plan = "cluster=2,stages=1"; });
        return all;
    }
    if (group == "beyond the last column") add(sums, [](Problem& p) { p.beyond = 1; });
    if (group == "beyond the last column of a bulk copy") add(kl, [](Problem& p) { p.beyond = 8; });
    if (group == "between rows") add(sums, [](Problem& p) { p.gap = 8, p.beyond = 3; });
    if (group != "edges") return all;
    // One-read, with columns that are no multiple of what threads, CTAs and the cluster take; slices of 8 columns.
    add(js, [](Problem& p) { p.columns = 64 + 8, p.gap = 8, p.offset = 16, p.padding = 24, p.exclude = true; });
    add(kl, [](Problem& p) { p.columns = 192 + 8, p.padding = 4096 + 7 * 8, p.mask = true, p.clusters = "1"; });
    add(kl, [](Problem& p) { p.rows = 1, p.columns = 8192 + 64, p.plan = "cluster=1,stages=4"; });
    add(student, [&](Problem& p) { alone(p), p.columns = 15 * 64 + 8, p.padding = 4, p.plan = "cluster=16,stages=4"; });
    // Two sweeps: whole vectors, their parts, elements one by one; rows shorter than a vector.
    add(many, [](Problem& p) { p.columns = 4099, p.gap = 3, p.offset = 1, p.teacher_gradient = p.exclude = true; });
    add(many, [](Problem& p) { p.columns = 2048, p.padding = 5, p.offset = 3, p.mask = p.saved = true; });
    add(many, [](Problem& p) { p.columns = 16392, p.gap = 8, p.labels_per_row = 3, p.saved = true; });
    add(labels, [](Problem& p) { p.columns = 16403, p.offset = 1, p.labels_per_row = 77, p.mask = p.exclude = true; });
    add(labels, [](Problem& p) { p.columns = 13, p.labels_per_row = 13, p.teacher_gradient = p.saved = true; });
    const auto few = [](Problem& p) { p.teacher = false, p.topk = "renyi", p.labels_per_row = 17; };
    add(topk,
        [&](Problem& p) { few(p), p.columns = 64 + 8, p.gap = 8, p.offset = 16, p.padding = 24, p.exclude = true; });
    add(topk,
        [&](Problem& p) { few(p), p.stats = {"logprob"}, p.columns = 15 * 64 + 8, p.plan = "cluster=16,stages=4"; });
    add(topk, [&](Problem& p) { few(p), p.columns = 4099, p.gap = 3, p.offset = 1, p.plan = "two-sweep"; });
    add(many, [](Problem& p) { p.columns = 203, p.shards = 3, p.offset = 1, p.teacher_gradient = p.mask = true; });
    add(labels, [](Problem& p) { p.columns = 37, p.shards = 35, p.labels_per_row = 9, p.repeated = 2; });
    add(sums, [](Problem& p) { p.columns = 33000, p.shards = 2, p.rows = 2, p.exclude = true; });
    for (const int64_t columns : {1, 7, 8, 9})
        for (const int element : {kFloat32, kBfloat16, kFloat16})
            add(many, [=](Problem& p) {
                p.columns = columns, p.element = element, p.padding = columns % 3, p.gap = 1;
                p.teacher_gradient = p.exclude = true;
            });
    return all;
}

bool bits_are(const Problem& problem, const std::string& expected) {
    try {
        if (solve(problem) == expected) return true;
        std::printf("%s: other bits\n", problem.name);
    } catch (const std::runtime_error& error) {
        // Without what was being launched, and where the other threads are.
        std::string what = error.what();
        const size_t thread = what.find(": thread ");
        if (thread != std::string::npos) what.erase(0, thread + 2);
        std::printf("%s: %s\n", problem.name, what.substr(0, what.find('\n')).c_str());
    }
    return false;
}

// Whether anything was wrong.
bool seen(int mutant, int seed, const std::vector<Problem>& problems, const std::vector<std::string>& expected) {
    std::fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        alarm(kMostSeconds);
        host::mutant = mutant;
        setenv("KLDIV_HOST_SEED", std::to_string(seed).c_str(), 1);
        bool right = true;
        for (size_t i = 0; i < problems.size() && right; ++i) right = bits_are(problems[i], expected[i]);
        std::fflush(stdout);
        _exit(right ? kRight : kWrong);
    }
    int status = 0;
    if (child < 0 || waitpid(child, &status, 0) != child) throw std::runtime_error("no process");
    if (WIFEXITED(status) && (WEXITSTATUS(status) == kRight || WEXITSTATUS(status) == kWrong))
        return WEXITSTATUS(status) == kWrong;
    std::printf("broke off with status %d\n", status);
    return true;
}

}  // namespace
}  // namespace kldiv::gpu

int main(int count, char** words) {
    using namespace kldiv::gpu;
    if (count < 5) return 2;
    const int mutant = std::atoi(words[1]), first = std::atoi(words[2]), seeds = std::atoi(words[3]);
    const std::vector<Problem> problems = problems_of(words[4]);
    const bool stop = count > 5;
    if (problems.empty()) return 2;
    // A mutant that goes on for ever is stopped long after the kernels would have ended.
    setenv("KLDIV_HOST_STEPS", "20000000", 1);
    std::vector<std::string> expected;
    for (const Problem& problem : problems) expected.push_back(solve(problem));
    int wrong = 0, seed = first;
    for (; seed < first + seeds && !(stop && wrong); ++seed) {
        if (seen(mutant, seed, problems, expected)) ++wrong;
    }
    std::printf("%d of %d seeds\n", wrong, seed - first);
    return wrong == 0 ? 0 : 1;
}
