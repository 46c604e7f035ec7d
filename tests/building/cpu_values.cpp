// Every statistic of the CPU code and its gradient on rows that are the same everywhere, as text: what
// test_other_processors.py compares between processors. Without PyTorch: its threads are left out.
#include <cstdio>
#include <cstring>
#include <vector>

#include "../../csrc/cpu/for_each.h"
#include "../../csrc/cpu/rows.h"

void kldiv::for_each(int64_t, int64_t count, const std::function<void(int64_t)>& work) {
    for (int64_t i = 0; i < count; ++i) work(i);
}

namespace {

constexpr int64_t kRows = 3;
constexpr const char* kNames[] = {"float32", "bfloat16", "float16"};

int64_t label_of(int64_t row, int64_t columns) { return row * (columns - 1) / (kRows - 1); }

// Logits between -5 and 5, some of them -inf, in the dtype. A row's label is a likely column.
std::vector<char> logits(kldiv::Dtype dtype, int64_t columns, uint32_t seed) {
    std::vector<char> data(kRows * columns * 4);
    const int64_t bytes = dtype == kldiv::Dtype::float32 ? 4 : 2;
    for (int64_t i = 0; i < kRows * columns; ++i) {
        seed = seed * 1664525u + 1013904223u;
        float x = (static_cast<float>(seed >> 8) / (1 << 24) - 0.5f) * 10.0f;
        if (i % columns == label_of(i / columns, columns)) x = 6.0f;
        if (i % 97 == 11) x = -std::numeric_limits<float>::infinity();
        kldiv::best_kernels().store[static_cast<int>(dtype)](&x, 1, &data[i * bytes]);
    }
    return data;
}

kldiv::Rows rows_of(const std::vector<char>& data, kldiv::Dtype dtype, int64_t columns) {
    kldiv::Rows rows;
    rows.data = data.data();
    rows.dtype = dtype;
    rows.sizes = {kRows};
    rows.strides = {columns};
    return rows;
}

// Values, then the gradient of their sum at every 13th column, as float32.
void print(const std::string& name, kldiv::Dtype dtype, int64_t columns) {
    const std::vector<char> student = logits(dtype, columns, 1), teacher = logits(dtype, columns, 2);
    const std::vector<int64_t> labels = {label_of(0, columns), label_of(1, columns), label_of(2, columns)};
    const std::vector<float> ones(kRows, 1.0f);
    std::vector<float> values(kRows);
    std::vector<char> gradient(kRows * columns * 4);
    kldiv::Job job;
    job.kernels = &kldiv::best_kernels();
    job.rows = kRows;
    job.columns = columns;
    job.labels = labels.data();
    job.student = rows_of(student, dtype, columns);
    job.teacher = rows_of(teacher, dtype, columns);
    const double parameters[] = {0.8, 1.25, 0.7, 0.3};
    std::memcpy(job.parameters, parameters, sizeof parameters);
    job.stats = {kldiv::find_statistic(name)};
    job.values = values.data();
    const bool differentiable = name != "argmax" && name != "max_logprob" && name.rfind("reference_", 0) != 0;
    if (differentiable) {
        job.coefficients = ones.data();
        job.d_student = {gradient.data(), dtype, columns};
    }
    kldiv::run_forward(job);
    std::printf("%s %s %ld value", name.c_str(), kNames[static_cast<int>(dtype)], static_cast<long>(columns));
    for (float value : values) std::printf(" %.9g", value);
    std::printf("\n");
    if (!differentiable) return;
    const int64_t bytes = dtype == kldiv::Dtype::float32 ? 4 : 2;
    std::printf("%s %s %ld gradient", name.c_str(), kNames[static_cast<int>(dtype)], static_cast<long>(columns));
    for (int64_t i = 0; i < kRows * columns; i += 13) {
        float x[kldiv::kPad];
        kldiv::best_kernels().load[static_cast<int>(dtype)](&gradient[i * bytes], 1, 1.0f, 0.0f, x);
        std::printf(" %.9g", x[0]);
    }
    std::printf("\n");
}

}  // namespace

int main() {
    std::printf("isa %s\n", kldiv::best_kernels().isa);
    for (const std::string& name : kldiv::served_statistics())
        for (auto dtype : {kldiv::Dtype::float32, kldiv::Dtype::bfloat16, kldiv::Dtype::float16})
            for (int64_t columns : {67, 9001}) print(name, dtype, columns);
}
