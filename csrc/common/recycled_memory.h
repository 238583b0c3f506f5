// Memory that outlives its tensor, for the next tensor of the same size.
//
// What a forward pass keeps for the second order is allocated and freed at every step. malloc gives blocks of that size
// back to the system whenever they lie at the end of its heap; the pages that come instead at the next step must be
// zeroed first, and that takes longer than the kernels.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <mutex>

namespace auxfast {

class RecycledMemory {
 public:
  static void* take(size_t bytes) {
    RecycledMemory& self = instance();
    {
      const std::lock_guard<std::mutex> lock(self.mutex_);
      for (Block*& spare : self.spare_)
        if (spare && spare->bytes == bytes) {
          Block* block = spare;
          spare = nullptr;
          return block + 1;
        }
    }
    auto* block = static_cast<Block*>(std::aligned_alloc(sizeof(Block), sizeof(Block) + (bytes + 63) / 64 * 64));
    STD_TORCH_CHECK(block != nullptr, "auxfast: out of memory for ", bytes, " bytes");
    block->bytes = bytes;
    return block + 1;
  }

  static void give_back(void* memory) {
    RecycledMemory& self = instance();
    Block* block = static_cast<Block*>(memory) - 1;
    if (block->bytes <= kMostBytes) {
      const std::lock_guard<std::mutex> lock(self.mutex_);
      std::swap(block, self.spare_[self.next_]);  // the oldest goes
      self.next_ = (self.next_ + 1) % kMostBlocks;
    }
    std::free(block);
  }

 private:
  static constexpr size_t kMostBytes = 1 << 20;  // of a block
  static constexpr int kMostBlocks = 4;
  struct alignas(64) Block {
    size_t bytes;
  };

  static RecycledMemory& instance() {
    static auto* only = new RecycledMemory;  // never destroyed: tensors may outlive everything
    return *only;
  }

  std::mutex mutex_;
  Block* spare_[kMostBlocks] = {};
  int next_ = 0;
};

}  // namespace auxfast
