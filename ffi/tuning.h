// Measured numbers: how the CUDA kernels are launched (benchmarks/notes.md, benchmarks/tune.py).
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "config.h"

namespace jax_dsv4 {

// How one CTA shares the reduction of one window over one slice of columns. A lane holds kLaneBytes
// of a row.
//   kWarps         warps of the CTA
//   kLanes         lanes across the slice's columns; all of a CTA's sets of kLanes share the rows
//   kRowsInFlight  rows a lane loads at a time
//   kMinCtas       CTAs that should fit an SM: limits the registers
// A lane's rows must be on one page, so the page size must be a multiple of their number,
// kReducedRows kLanes / (32 kWarps).
template <int kWarps_, int kLanes_, int kRowsInFlight_, int kMinCtas_, int kLaneBytes_ = 16>
struct Geometry {
  static constexpr int kWarps = kWarps_;
  static constexpr int kLanes = kLanes_;
  static constexpr int kRowsInFlight = kRowsInFlight_;
  static constexpr int kMinCtas = kMinCtas_;
  static constexpr int kLaneBytes = kLaneBytes_;
};

// The geometries of a kind, on raw states. A call takes the first whose page size fits, of all of
// them, or from kFew on while requests x head_dim is at most kFewChannels. The last serves any page
// size.
template <class Kind>
struct GeometriesOf {
  static_assert(Kind::kReducedRows <= 32, "a long window needs geometries of its own: see tune.py");
  static constexpr int kWarps = std::min(4, Kind::kReducedRows);
  using AnyPage = Geometry<kWarps, 32 * kWarps / Kind::kReducedRows, 1, 1>;  // a row per lane
  using List = std::conditional_t<(Kind::kReducedRows > kWarps),
                                  TypeList<Geometry<kWarps, 32, 2, 1>, AnyPage>, TypeList<AnyPage>>;
  static constexpr int kFew = 0;
  static constexpr int64_t kFewChannels = 0;
};
template <int kHeadDim>
struct GeometriesOf<Kind<kHeadDim, 128, false>> {
  using List = TypeList<Geometry<4, 16, 8, 4>, Geometry<8, 8, 4, 3>, Geometry<8, 2, 1, 1>>;
  static constexpr int kFew = 1;
  static constexpr int64_t kFewChannels = 64 * 512;
};

// Of states of 2 bytes: 8 channels of a row are twice the instructions that a lane has for 4 of
// f32. Where requests are few, lanes have as many channels as there.
using FewHalfGeometry = Geometry<8, 8, 4, 3, 8>;
inline constexpr int64_t kFewHalfChannels = 24 * 512;

// On a state of prefixes, a warp takes one token of a request while requests x head_dim is at most
// this, and all of them beyond.
inline constexpr int64_t kFewPrefixChannels = 24 * 512;
inline constexpr int64_t kFewPrefixChannelsOfMoreTokens = 16 * 512;  // for 5 to 8

// The same of a step that ends in records. Few requests have CTAs of kThreads for their values, and
// others for their rows. More have CTAs for each half of their rows; and many, where windows
// overlap, one for both, kPartChannels on. Of a pair, by its main compressor's channels.
template <class Kind>
struct PrefixRecordGeometryOf {
  static constexpr int kThreads = 128;
  static constexpr int64_t kFewChannels = 48 * 512, kPartChannels = int64_t{1} << 62;
};
template <int kHeadDim>
struct PrefixRecordGeometryOf<Kind<kHeadDim, 4, true>> {
  static constexpr int kThreads = kHeadDim > 128 ? 256 : 128;
  static constexpr int64_t kFewChannels = 24 * 512, kPartChannels = kHeadDim > 128 ? 128 * 512 : 0;
  static constexpr int64_t kFewPairChannels = 16 * 512, kPairPartChannels = 48 * 512;
};

// Whether new rows wait in shared memory where requests are many: three CTAs then fit an SM, not
// two. Rows of f32 take more than the 48 KB that a kernel has without asking for more.
template <class Config>
inline constexpr bool kStagesRows = Config::kOverlap && Config::kHeadDim > 128 &&
                                    sizeof(typename Config::KvScore) == 2;

// The geometries of a kind in a step on raw states that ends in records: at most 8 CTAs, one
// cluster, share a window. Of those whose page size fits, and whose clusters the chip has, a call
// takes the first whose kMostChannels its requests x head_dim do not pass, or else the first; where
// none fits, the last, which has no cluster, with its rows looked up one by one.
template <int64_t kMostChannels_, class Geometry_>
struct UpTo {
  static constexpr int64_t kMostChannels = kMostChannels_;
  using Geometry = Geometry_;
};
inline constexpr int64_t kAnyChannels = int64_t{1} << 62;
template <class Kind>
struct RecordGeometriesOf {
  static_assert(Kind::kReducedRows <= 32, "a long window needs geometries of its own");
  static constexpr int kLanes = Kind::kHeadDim / 4;  // one CTA of at most 256 threads
  static constexpr int kRowGroups = std::max(1, std::min(Kind::kReducedRows / 2, 256 / kLanes));
  using List = TypeList<UpTo<kAnyChannels, Geometry<kLanes * kRowGroups / 32, kLanes, 4, 1>>>;
};
template <int kHeadDim>
struct RecordGeometriesOf<Kind<kHeadDim, 128, false>> {
  using List = TypeList<UpTo<8 * 512, Geometry<8, 16, 8, 2>>, UpTo<32 * 512, Geometry<4, 16, 8, 4>>,
                        UpTo<kAnyChannels, Geometry<16, 128, 8, 1>>>;
};

// Of a ragged batch, short windows, most of whose rows are not stored: so many CTAs of walkers are
// on an SM, all at once, and each walks as many slots as that takes.
inline constexpr int kWalkerCtas = 2, kWalkerCtasOfRecords = 3;
// Where all rows are stored a walker has no more slots than these; but of records on a state of
// prefixes as many as that takes, if it takes no more than kStoringSlotsAtOnce.
inline constexpr int kStoringSlotsOfRaw = 3, kStoringSlotsOfPrefix = 2;
inline constexpr int kStoringSlotsOfPrefixRecords = 3, kStoringSlotsAtOnce = 8;
// Records are made in turns: a walker of more than one has whole ones, unless they are so many.
inline constexpr int kManyTurns = 4;
// CTAs of requests come before those of walkers that have at most so many slots, as they take
// longer. They come behind walkers of more: before those they would leave them unevenly placed,
// three on one SM and one on another.
inline constexpr int kFewSlotsOfWalker = 4;
// Of a ragged batch of few rows each on a state of prefixes, while requests x state_dim is at most
// this, a thread has one channel.
inline constexpr int64_t kNarrowRaggedChannels = 64 * 512;

}  // namespace jax_dsv4
