// Process groups of c10d over Gloo: what several processes do with their tensors together.
//
// The store (a key-value server of one of them) is where they find each other; after that they talk directly.
// Operations run on the group's own threads; a handle keeps their tensors alive and is waited for.
#include "shim.h"
#include <ATen/ops/empty.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

namespace {
using at::Tensor;
using Millis = std::chrono::milliseconds;

struct Group {
  c10::intrusive_ptr<c10d::Store> store; // the server lives as long
  c10::intrusive_ptr<c10d::ProcessGroupGloo> backend;
};
struct Pending {
  c10::intrusive_ptr<c10d::Work> work;
};
c10d::ReduceOp reduction(int op) {
  switch (op) {
  case 1: return c10d::ReduceOp::MIN;
  case 2: return c10d::ReduceOp::MAX;
  default: return c10d::ReduceOp::SUM;
  }
}
} // namespace

// As in ffi.rs.
struct RlhfRendezvous {
  const char *host, *prefix, *interface; // interface may be null
  int64_t port, rank, size, timeout_ms;
  int listens;
};

RLHF_API char *rlhf_group_new(Group **out, const RlhfRendezvous *r) {
  return rlhf::guard([&] {
    const Millis timeout(r->timeout_ms);
    c10d::TCPStoreOptions options;
    options.port = (uint16_t)r->port;
    options.isServer = r->listens != 0;
    options.waitWorkers = false; // who comes late is waited for below
    options.timeout = timeout;
    auto store = c10::make_intrusive<c10d::PrefixStore>(r->prefix, c10::make_intrusive<c10d::TCPStore>(r->host, options));
    auto settings = c10d::ProcessGroupGloo::Options::create(timeout);
    settings->devices.push_back(r->interface ? c10d::ProcessGroupGloo::createDeviceForInterface(r->interface)
                                             : c10d::ProcessGroupGloo::createDefaultDevice());
    auto backend = c10::make_intrusive<c10d::ProcessGroupGloo>(store, (int)r->rank, (int)r->size, settings);
    *out = new Group{std::move(store), std::move(backend)};
  });
}
RLHF_API void rlhf_group_free(Group *group) noexcept { delete group; }

// What: 0 all-reduce (in place), 1 broadcast from `root` (in place), 2 all-gather of `in` into `out`, 3
// reduce-scatter of `in` into `out`. Tensors are contiguous, on the CPU and want no gradient.
RLHF_API char *rlhf_collective(Pending **pending, Group *group, int what, const Tensor *in, const Tensor *out, int op,
                               int64_t root) {
  return rlhf::guard([&] {
    c10::AutoGradMode off(false);
    std::vector<Tensor> both{*in};
    auto result = out ? *out : Tensor();
    auto source = *in;
    c10::intrusive_ptr<c10d::Work> work;
    if (what == 0) {
      c10d::AllreduceOptions o;
      o.reduceOp = reduction(op);
      work = group->backend->allreduce(both, o);
    } else if (what == 1) {
      c10d::BroadcastOptions o;
      o.rootRank = root;
      work = group->backend->broadcast(both, o);
    } else if (what == 2) {
      work = group->backend->_allgather_base(result, source);
    } else {
      c10d::ReduceScatterOptions o;
      o.reduceOp = reduction(op);
      work = group->backend->_reduce_scatter_base(result, source, o);
    }
    *pending = new Pending{std::move(work)};
  });
}
// Rank 0 names those that did not come.
RLHF_API char *rlhf_barrier(Group *group) {
  return rlhf::guard([&] { group->backend->monitoredBarrier(c10d::BarrierOptions(), true); });
}
RLHF_API int rlhf_pending_done(Pending *pending) noexcept {
  try {
    return pending->work->isCompleted();
  } catch (...) {
    return 1; // waiting says what is wrong
  }
}
RLHF_API char *rlhf_pending_wait(Pending *pending) {
  return rlhf::guard([&] { TORCH_CHECK(pending->work->wait(), "the operation was aborted"); });
}
RLHF_API void rlhf_pending_free(Pending *pending) noexcept { delete pending; }
