// How many clusters of each shape this device holds at a time, asked as the launcher asks: a line of JSON.
//
//     nvcc -std=c++17 --expt-relaxed-constexpr -arch=sm_90 benchmarks/gpu_clusters.cu csrc/plan.cpp -o clusters
#include <cstdio>
#include <exception>

#include "../csrc/cuda/one_read/kernel.cuh"
#include "../csrc/cuda/machine/runtime.cuh"

namespace {

constexpr int64_t kVocabularies[] = {32000, 128256, 151936, 262144};

// Slots of the student alone (entropy), or of student and teacher (forward_kl), of bfloat16.
template <class D>
void print(int64_t columns, int tensors, const char** separator) {
    using namespace kldiv::gpu;
    const DeviceInfo& device = device_info();
    for (int cluster = 1; cluster <= 16; cluster *= 2) {
        const int64_t slot = kldiv::cluster_slice(columns, cluster) * 2 * tensors;
        const int64_t head = kldiv::one_read_head_bytes(cluster);
        for (int stages = 1; stages <= kldiv::kMostStages && head + stages * slot <= device.shared_bytes; ++stages) {
            LaunchShape shape;
            shape.threads = kldiv::kOneReadThreads;
            shape.cluster = cluster;
            shape.shared_bytes = head + stages * slot;
            const int clusters = active_clusters(one_read<D, kldiv::kBfloat16>, shape);
            std::printf(
                "%s{\"vocab\": %lld, \"tensors\": %d, \"cluster\": %d, \"stages\": %d, \"shared_bytes\": %lld, "
                "\"clusters\": %d, \"blocks\": %d}",
                *separator, static_cast<long long>(columns), tensors, cluster, stages,
                static_cast<long long>(shape.shared_bytes), clusters, clusters * cluster);
            *separator = ", ";
        }
    }
}

}  // namespace

int main() {
    try {
        std::printf("{\"processors\": %d, \"shapes\": [", kldiv::gpu::device_info().processors);
        const char* separator = "";
        for (const int64_t columns : kVocabularies) {
            print<kldiv::gpu::Entropy>(columns, 1, &separator);
            print<kldiv::gpu::ForwardKl>(columns, 2, &separator);
        }
        std::printf("]}\n");
        return 0;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
