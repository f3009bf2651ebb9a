// The normal distribution by pieces, for instruction sets that look up one of 32 numbers at once:
// a division would take longer than five of these.
#ifndef TT_NORMAL_TABLE_H_
#define TT_NORMAL_TABLE_H_

namespace tt {

// Phi(z) - 1/2 for z in [0, kEnd], from where on it is 1/2 in float32. Piece i is around
// i / kPiecesPerUnit, a polynomial in z * kPiecesPerUnit - i, which lies in [-1/2, 1/2].
struct NormalTable {
  static constexpr int kPieces = 32, kDegree = 4;
  static constexpr float kEnd = 5.6f, kPiecesPerUnit = (kPieces - 1) / kEnd;

  float coefficients[kDegree + 1][kPieces];

  consteval NormalTable() : coefficients() {
    for (int i = 0; i < kPieces; ++i) Interpolate(i);
  }

 private:
  // Through the values at Chebyshev's nodes, in Newton's form: off by less than 1e-8.
  consteval void Interpolate(int piece) {
    constexpr double kNodes[] = {-0.47552825814757677, -0.29389262614623657, 0.0,
                                 0.29389262614623657, 0.47552825814757677};
    double newton[kDegree + 1] = {}, power[kDegree + 1] = {};
    for (int k = 0; k <= kDegree; ++k) newton[k] = HalfMass((piece + kNodes[k]) / kPiecesPerUnit);
    for (int order = 1; order <= kDegree; ++order) {
      for (int k = kDegree; k >= order; --k) {
        newton[k] = (newton[k] - newton[k - 1]) / (kNodes[k] - kNodes[k - order]);
      }
    }
    for (int k = kDegree; k >= 0; --k) {  // power = power * (x - node) + newton
      for (int i = kDegree; i > 0; --i) power[i] = power[i - 1] - kNodes[k] * power[i];
      power[0] = newton[k] - kNodes[k] * power[0];
    }
    for (int i = 0; i <= kDegree; ++i) coefficients[i][piece] = static_cast<float>(power[i]);
  }

  // Phi(z) - 1/2 = phi(z) (z + z^3 / 3 + z^5 / (3 * 5) + ...), with phi(z) = e^(-z^2 / 2) / sqrt(2
  // pi).
  static consteval double HalfMass(double z) {
    constexpr int kTerms = 120;
    double exp = 1.0, exp_term = 1.0, sum = z, term = z;
    for (int k = 1; k < kTerms; ++k) {
      exp += exp_term *= z * z / 2.0 / k;
      sum += term *= z * z / (2 * k + 1);
    }
    return 0.3989422804014327 / exp * sum;
  }
};

inline constexpr NormalTable kNormalTable;

}  // namespace tt

#endif  // TT_NORMAL_TABLE_H_
