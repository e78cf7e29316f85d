// One optimizer's buffers on the device, and the operations of its step.
#pragma once
#include "cuda/kernels.h"
#include "kernels_alone/runtime.h"

namespace alone {

using namespace sparse_optim;

// Where a run is: `targets[t]` entries are to be active after t steps, `taken` steps are done,
// and no step unmasks more than `most`.
struct Run {
  std::vector<int64_t> targets;
  int64_t taken;
  int64_t most;
};

using Positions = std::vector<std::vector<int32_t>>;  // of each tensor, ascending
using Entry = std::pair<int64_t, int64_t>;            // tensor, position

class Optimizer {
 public:
  Optimizer(std::vector<Row> pool_rows, const Positions& active, const Run& run)
      : rows(std::move(pool_rows)),
        capacity(*std::max_element(run.targets.begin(), run.targets.end())),
        most(run.most) {
    std::vector<int64_t> first_tile{0}, first_active{0};
    std::vector<int32_t> positions;
    for (const Row& row : rows)
      first_tile.push_back(first_tile.back() + (row.numel + kMaxTile - 1) / kMaxTile);
    for (const auto& each : active) {
      positions.insert(positions.end(), each.begin(), each.end());
      first_active.push_back(int64_t(positions.size()));
    }
    held = int64_t(positions.size());
    positions.resize(size_t(capacity));
    const size_t entries = size_t(capacity), tensors = rows.size();
    table = DeviceArray<int64_t>(tensors * kColumns);
    tile_offsets = DeviceArray<int64_t>(first_tile);
    position = DeviceArray<int32_t>(positions);
    unmask_step = DeviceArray<int32_t>(std::vector<int32_t>(entries, 1));
    offsets = DeviceArray<int64_t>(first_active);
    progress = DeviceArray<int64_t>(std::vector<int64_t>{run.taken, held, 0});
    targets = DeviceArray<int64_t>(run.targets);
    exp_avg = DeviceArray<float>(std::vector<float>(entries, 1e-4f));
    exp_avg_sq = DeviceArray<float>(std::vector<float>(entries, 1e-6f));
    master = DeviceArray<float>(std::vector<float>(entries, 0.5f));
    active_grad = DeviceArray<float>(entries);
    tile_max = DeviceArray<int32_t>(size_t(first_tile.back()));
    new_tensor = DeviceArray<int32_t>(size_t(most));
    new_position = DeviceArray<int32_t>(size_t(most));
    new_count = DeviceArray<int64_t>(std::vector<int64_t>{0});
    norms = DeviceArray<double>(tensors);
    grad_norm = DeviceArray<double>(1);
    found_inf = DeviceArray<float>(std::vector<float>{0.f});
    arrived = DeviceArray<unsigned>(std::vector<unsigned>{0});
    threshold = DeviceArray<float>(std::vector<float>{0.f});
    grad_factor = DeviceArray<float>(1);
    grad_scale = DeviceArray<float>(std::vector<float>{1.f});
    hyper = DeviceArray<Hyper>(std::vector<Hyper>{{1e-3, 0.9, 0.999, 1e-8, 0.01, 1.0}});
    group_index = DeviceArray<int32_t>(std::vector<int32_t>(tensors, 0));
    scratch = DeviceArray<char>(size_t(cuda::scratch_bytes(first_tile.back(), capacity, most)));
    pool = {table.get(), tile_offsets.get(), int64_t(tensors), first_tile.back(), kMaxTile};
  }

  void bind(cudaStream_t stream) { MUST(cuda::write_table(rows, table.get(), stream)); }
  void scan(cudaStream_t stream) {
    const cuda::ScanOutput out{tile_max.get(), active_grad.get(), norms.get(), found_inf.get()};
    MUST(cuda::scan(pool, {}, position.get(), offsets.get(), out, scratch.get(), stream));
  }
  void cut(double exp, cudaStream_t stream) {
    const cuda::CutInput in{tile_max.get(), nullptr,         targets.get(), int64_t(targets.size()),
                            progress.get(), found_inf.get(), exp,           1.f,
                            nullptr};
    MUST(cuda::cut(pool, position.get(), offsets.get(), in, found(), threshold.get(), scratch.get(),
                   stream));
  }
  void append(cudaStream_t stream) {
    MUST(cuda::append(pool, found(), active(), capacity, scratch.get(), stream));
  }
  void clip(cudaStream_t stream) {
    MUST(cuda::clip(norms.get(), pool.num_tensors, grad_scale.get(), 1.0, grad_norm.get(),
                    grad_factor.get(), stream));
  }
  void update(cudaStream_t stream) {
    MUST(cuda::update(pool, active(), capacity, grad_factor.get(), found_inf.get(), hyper.get(), 1,
                      group_index.get(), true, arrived.get(), stream));
  }
  void step(double exp, cudaStream_t stream) {
    bind(stream), scan(stream), cut(exp, stream), append(stream), clip(stream), update(stream);
  }

  // New entries of the last `cut` or `collect_end`.
  std::vector<Entry> last_new() const {
    const size_t count = size_t(new_count.download()[0]);
    const auto tensor = new_tensor.download(count);
    const auto at = new_position.download(count);
    std::vector<Entry> found;
    for (size_t i = 0; i < count; ++i) found.push_back({tensor[i], at[i]});
    return found;
  }
  // What `cut` would unmask next, of gradients that come one at a time, the last first.
  std::vector<Entry> collect(double exp) {
    bind(nullptr), scan(nullptr);
    DeviceArray<char> collected(size_t(cuda::collected_bytes(most)));
    DeviceArray<float> grad{size_t(most)};
    const std::vector<int64_t> first = tile_offsets.download();
    MUST(cuda::collect_begin({targets.get(), int64_t(targets.size()), progress.get()}, most,
                             collected.get(), nullptr));
    for (size_t t = rows.size(); t-- > 0;) {
      const int64_t tiles = first[t + 1] - first[t];
      const DeviceArray<int64_t> own(std::vector<int64_t>{0, tiles});
      const cuda::Pool part{table.get() + int64_t(t) * kColumns, own.get(), 1, tiles, kMaxTile};
      MUST(cuda::collect(part, position.get(), offsets.get() + t, tile_max.get() + first[t],
                         nullptr, exp, 1.f, false, int64_t(t), most, collected.get(), scratch.get(),
                         nullptr));
      MUST(cudaDeviceSynchronize());
    }
    MUST(cuda::collect_end(found_inf.get(), found(), threshold.get(), grad.get(), most,
                           collected.get(), nullptr));
    MUST(cudaDeviceSynchronize());
    return last_new();
  }

  std::vector<Row> rows;
  int64_t capacity, most, held;
  cuda::Pool pool;
  DeviceArray<unsigned> arrived;
  DeviceArray<int64_t> table, tile_offsets, offsets, progress, targets, new_count;
  DeviceArray<int32_t> position, unmask_step, tile_max, new_tensor, new_position, group_index;
  DeviceArray<float> exp_avg, exp_avg_sq, master, active_grad, found_inf, threshold, grad_factor,
      grad_scale;
  DeviceArray<double> norms, grad_norm;
  DeviceArray<Hyper> hyper;
  DeviceArray<char> scratch;

 private:
  Active active() const {
    return {position.get(), exp_avg.get(),     exp_avg_sq.get(), unmask_step.get(),
            master.get(),   active_grad.get(), offsets.get(),    progress.get()};
  }
  NewEntries found() const { return {new_tensor.get(), new_position.get(), new_count.get(), most}; }
};

}  // namespace alone
