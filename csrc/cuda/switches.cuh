// Choices that only a GPU can decide between, each with a default by reasoning. A build with, say, -DQUANTOPS_STORES=2
// has another one of them: bench/machine_code/variants.py lists those that are worth a comparison and builds them.
#pragma once
#include <cstdint>

// How results are stored: 0 as __stwb does (STG.STRONG.SM), 1 plainly, 2 as what is not read again soon (evict first).
// Plainly: q is read next, by the layer, from L2 where it fits.
#ifndef QUANTOPS_STORES
#define QUANTOPS_STORES 1
#endif

// Elements per item, the run of one warp: between these, a power of two. The least lets the weights of a ResNet-20 fill
// an H100; with the largest, what a warp does before its first element is 4 % of what it does, and resident warps read
// memory that lies together.
#ifndef QUANTOPS_LEAST_SEGMENT
#define QUANTOPS_LEAST_SEGMENT 256
#endif
#ifndef QUANTOPS_LARGEST_SEGMENT
#define QUANTOPS_LARGEST_SEGMENT 8192
#endif
// About as many items are made of a list where that is between the two: a few times the warps that an H100 holds. With
// more, what warps do before their first element and with their sums would take a third of the time of 16M weights.
#ifndef QUANTOPS_ITEMS
#define QUANTOPS_ITEMS 8192
#endif

// The same of absmax and absmean: as many as there are warps at work on an H100, 32 on each of 132 multiprocessors. The
// last block adds up so many in place of a second launch. And of MSQ's forward pass, whose one wave of items would end
// unevenly on a list: an H200 takes a quarter more for the weights of a ResNet-50 with 4096, and as much for 16M.
#ifndef QUANTOPS_REDUCTION_ITEMS
#define QUANTOPS_REDUCTION_ITEMS 4096
#endif
#ifndef QUANTOPS_MSQ_ITEMS
#define QUANTOPS_MSQ_ITEMS 8192
#endif

// Whether a warp's first elements are asked for before its quantizer is made, which takes three divisions.
#ifndef QUANTOPS_EARLY_LOADS
#define QUANTOPS_EARLY_LOADS 1
#endif

// Elements that a lane asks for at a time, where they are no more than 64 bytes: 16 are 32 bytes of bfloat16.
#ifndef QUANTOPS_ELEMENTS_IN_FLIGHT
#define QUANTOPS_ELEMENTS_IN_FLIGHT 32
#endif

// MSQ's forward pass: blocks that are to fit a multiprocessor, and the bytes that a lane asks for at a time where q is
// written. 2 blocks leave a thread 128 registers, 3 leave 80, 4 leave 64, which are too few for 64 bytes. Its some 20
// instructions for an element want many warps beside those that wait for memory.
#ifndef QUANTOPS_MSQ_BLOCKS
#define QUANTOPS_MSQ_BLOCKS 4
#endif
#ifndef QUANTOPS_MSQ_BYTES
#define QUANTOPS_MSQ_BYTES 32
#endif

// Items up to which the last block of a launch adds up what all have left, in place of a second launch; 0: never. It
// takes a round trip to memory for each 1024 items, and one for each 8 sums.
#ifndef QUANTOPS_LAST_BLOCK_ITEMS
#define QUANTOPS_LAST_BLOCK_ITEMS 4096
#endif

namespace quantops::cuda {

constexpr int64_t kLeastSegment = QUANTOPS_LEAST_SEGMENT, kLargestSegment = QUANTOPS_LARGEST_SEGMENT;
constexpr int64_t kWantedItems = QUANTOPS_ITEMS, kLastBlockItems = QUANTOPS_LAST_BLOCK_ITEMS;
constexpr int64_t kReductionItems = QUANTOPS_REDUCTION_ITEMS, kMsqItems = QUANTOPS_MSQ_ITEMS;
constexpr int64_t kReductionStep =
    512;  // of the elements of an item, above as many: all that a warp asks for at a time
constexpr int64_t kLastBlockGroups = 64;
constexpr int kElementsInFlight = QUANTOPS_ELEMENTS_IN_FLIGHT;
constexpr int kMsqBlocks = QUANTOPS_MSQ_BLOCKS, kMsqBytes = QUANTOPS_MSQ_BYTES;
constexpr bool kEarlyLoads = QUANTOPS_EARLY_LOADS;

}  // namespace quantops::cuda
