#include "amx_tiles.h"

#include <cstdint>
#include <cstring>

#include "bfloat16.h"
#include "check.h"

namespace tt::test::amx {
namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct Tile {
  int rows = 0, row_bytes = 0;  // as configured
  unsigned char bytes[kRows][kRowBytes];

  template <typename T>
  T Get(int row, int i) const {
    T x;
    std::memcpy(&x, &bytes[row][i * sizeof(x)], sizeof(x));
    return x;
  }
  float Bf16(int row, int i) const { return FromBf16(Get<uint16_t>(row, i)); }
};

thread_local Tile tiles[kTiles];

Tile& Configured(int tile) {
  CHECK(tiles[tile].rows > 0 && tiles[tile].row_bytes > 0);
  return tiles[tile];
}

}  // namespace

void LoadConfig(const void* config) {
  const auto* bytes = static_cast<const unsigned char*>(config);
  CHECK_EQ(int{bytes[0]}, 1);  // the palette
  for (int i = 0; i < kTiles; ++i) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * i, sizeof(row_bytes));
    const int rows = bytes[48 + i];
    CHECK(rows <= kRows && row_bytes <= kRowBytes && (rows == 0) == (row_bytes == 0));
    tiles[i] = {.rows = rows, .row_bytes = row_bytes, .bytes = {}};
  }
}

void Release() {
  for (Tile& tile : tiles) tile.rows = tile.row_bytes = 0;
}

void Zero(int tile) { std::memset(Configured(tile).bytes, 0, sizeof(Tile::bytes)); }

void Load(int tile, const void* from, size_t stride) {
  Zero(tile);
  for (int row = 0; row < tiles[tile].rows; ++row) {
    std::memcpy(tiles[tile].bytes[row], static_cast<const char*>(from) + row * stride,
                tiles[tile].row_bytes);
  }
}

void Store(int tile, void* to, size_t stride) {
  const Tile& from = Configured(tile);
  for (int row = 0; row < from.rows; ++row) {
    std::memcpy(static_cast<char*>(to) + row * stride, from.bytes[row], from.row_bytes);
  }
}

// sum (m, n) float32 += a (m, 2 k) b (k, n, 2).
void DotBf16(int sum, int a, int b) {
  Tile& out = Configured(sum);
  const Tile &left = Configured(a), &right = Configured(b);
  const int num_pairs = left.row_bytes / 4;
  CHECK(left.rows == out.rows && right.rows == num_pairs && right.row_bytes == out.row_bytes);
  for (int m = 0; m < out.rows; ++m) {
    for (int n = 0; n < out.row_bytes / 4; ++n) {
      float x = out.Get<float>(m, n);
      for (int k = 0; k < num_pairs; ++k) {
        x += left.Bf16(m, 2 * k) * right.Bf16(k, 2 * n);
        x += left.Bf16(m, 2 * k + 1) * right.Bf16(k, 2 * n + 1);
      }
      std::memcpy(&out.bytes[m][n * sizeof(x)], &x, sizeof(x));
    }
  }
}

}  // namespace tt::test::amx
