// The relational graph layer on a CPU: one pass over the bases forward and one backward.
//
// The bases of a node lie side by side. What leaves a node under one relation, a group of edges, is
// one message: it is mixed once, and the rows that receive it gather it. Backward, the gradients of
// a group are gathered once, and the bases of a node are read and their gradients written once.
// Rows and nodes are cut into blocks whose results do not depend on who computes them.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define X86 1
#include <immintrin.h>
#else
#define X86 0
#endif
#pragma GCC diagnostic ignored "-Wpsabi"

namespace {

constexpr int64_t BLOCK = 512;  // nodes
constexpr int64_t AHEAD = 12;   // rows between what is added and what is asked for from memory

// N nodes, R relations, G groups, B bases, d numbers in a row. Edges are compressed by columns and
// by rows, as EdgeIndex describes.
struct Problem {
  int64_t nodes, relations, groups, edges, bases, width, stream;
  const int32_t *node_groups, *group_relation, *group_edges, *edge_target;
  const float* edge_weight;
  const int32_t *row_edges, *row_group;
  const float* row_weight;
  const float *basis, *att;           // (N, B, d), (R, B)
  const float *root, *bias, *grad;    // (N, d), (d), (N, d)
  float *messages, *output;           // (G, d), (N, d)
  float* grad_basis;                  // (N, B, d)
  double* grad_att;                   // (blocks, R, B)
};

using Pass = void (*)(const Problem&, int64_t block, float* scratch);

struct Level {
  Pass mix, gather, backward;
  int64_t lanes;
};

}  // namespace

#define ISA plain
#define TARGET
#define LANES 4
#include "native_kernel.h"
#undef ISA
#undef TARGET
#undef LANES

#if X86
#define ISA avx2
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#include "native_kernel.h"
#undef ISA
#undef TARGET
#undef LANES

#define ISA avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define LANES 16
#include "native_kernel.h"
#endif

namespace {

const Level& level_of(int64_t level) {
#if X86
  if (level == 1) return avx2::LEVEL;
  if (level == 2) return avx512::LEVEL;
#endif
  return plain::LEVEL;
}

int64_t blocks_of(const Problem& p) { return (p.nodes + BLOCK - 1) / BLOCK; }

void for_blocks(const Problem& p, Pass pass, int64_t scratch, int64_t threads) {
  const int64_t blocks = blocks_of(p);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> own(scratch);
#pragma omp for schedule(dynamic)
    for (int64_t block = 0; block < blocks; ++block) pass(p, block, own.data());
#if X86
    _mm_sfence();  // what was streamed must be seen by other threads
#endif
  }
}

}  // namespace

extern "C" {

// The best set of instructions of this machine: 0 is plain, 1 AVX2 and 2 AVX-512.
int64_t graph_best_level() {
#if X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return 2;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

int64_t graph_block_nodes() { return BLOCK; }

// sizes: N, R, G, E, B, d. columns and rows: the tensors of EdgeIndex.
// Writes messages (G, d), which are scratch, and output (N, d).
void graph_forward(const int64_t* sizes, const int32_t* node_groups, const int32_t* group_relation,
                   const int32_t* row_edges, const int32_t* row_group, const float* row_weight,
                   const float* basis, const float* att, const float* root, const float* bias,
                   float* messages, float* output, int64_t threads, int64_t level) {
  Problem p = {};
  p.nodes = sizes[0], p.relations = sizes[1], p.groups = sizes[2], p.edges = sizes[3];
  p.bases = sizes[4], p.width = sizes[5], p.stream = p.width % 4 == 0;
  p.node_groups = node_groups, p.group_relation = group_relation;
  p.row_edges = row_edges, p.row_group = row_group, p.row_weight = row_weight;
  p.basis = basis, p.att = att, p.root = root, p.bias = bias;
  p.messages = messages, p.output = output;
  for_blocks(p, level_of(level).mix, 0, threads);
  for_blocks(p, level_of(level).gather, 0, threads);
}

// Writes grad_basis (N, B, d), and grad_att (R, B) from partial sums (blocks, R, B).
void graph_backward(const int64_t* sizes, const int32_t* node_groups,
                    const int32_t* group_relation, const int32_t* group_edges,
                    const int32_t* edge_target, const float* edge_weight, const float* basis,
                    const float* att, const float* grad, float* grad_basis, double* partial,
                    float* grad_att, int64_t threads, int64_t level) {
  Problem p = {};
  p.nodes = sizes[0], p.relations = sizes[1], p.groups = sizes[2], p.edges = sizes[3];
  p.bases = sizes[4], p.width = sizes[5], p.stream = p.width % 4 == 0;
  p.node_groups = node_groups, p.group_relation = group_relation, p.group_edges = group_edges;
  p.edge_target = edge_target, p.edge_weight = edge_weight;
  p.basis = basis, p.att = att, p.grad = grad, p.grad_basis = grad_basis, p.grad_att = partial;
  const Level& kernels = level_of(level);
  // Of a node at most R groups, each with its gradient and the weights of its bases; and the sums
  // of products, a vector for each relation and base.
  const int64_t pairs = p.relations * p.bases;
  const int64_t scratch = p.relations * p.width + pairs + pairs * kernels.lanes;
  for_blocks(p, kernels.backward, scratch, threads);
  for (int64_t i = 0; i < pairs; ++i) {
    double sum = 0;
    for (int64_t block = 0; block < blocks_of(p); ++block) sum += partial[block * pairs + i];
    grad_att[i] = static_cast<float>(sum);
  }
}

}  // extern "C"
