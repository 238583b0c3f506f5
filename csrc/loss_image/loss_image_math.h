// The loss image's formulas for one pixel, or for a vector of pixels: V is a CUDA thread's number or a SIMD vector.
//
// clang-format off
// Value. The last pool, the 1x1 convolution and the mean over positions are all linear, so they are one weighted sum:
//   g = r sum_p sum_c w_c act(z_depth[c, p])   over the positions p that the pool keeps,   r = 1 / (their number)
// No h_depth is needed, and the gradient that reaches act(z_depth) is the constant r w_c.
//
// First order. With e_i = d g / d z_i, which the code calls e:
//   e_depth = act'(z_depth) r w   at positions that the pool keeps, 0 elsewhere
//   e_i     = act'(z_i) unpool(W_{i+1}^T * e_{i+1})
//   d g / d h_0 = W_1^T * e_1
// where W^T * is the convolution with the transposed, flipped kernels (again with padding 1), and unpool gives each
// pixel of a window 1/4 of the window's gradient (1/2 or 1 where a pool does nothing along a dimension). In phi:
//   d g / d W_i[o, c, dy, dx] = sum_p e_i[o, p] h_{i-1}[c, p + (dy, dx)]
//   d g / d b_i = sum_p e_i,   d g / d w = r sum_p act(z_depth)
//
// Second order, for a tangent t of the losses. F = <d g / d h_0, t> is the derivative of g along t, so carry the
// tangent beside the value,
//   hd_0 = t,   zd_i = W_i * hd_{i-1},   hd_i = pool(act'(z_i) zd_i),   F = r sum_p w act'(z_depth) zd_depth,
// and reverse through both. The tangent's part is the first-order recursion, adj(zd_i) = e_i. The code calls adj(z_i)
// kappa:
//   kappa_i = act'(z_i) adj(act(z_i)) + act''(z_i) zd_i adj(act'(z_i) zd_i)
//           = act'(z_i) unpool(W_{i+1}^T * kappa_{i+1}) + (act''/act') zd_i e_i
//   kappa_depth = (act''/act') zd_depth e_depth
//   d F / d h_0 = W_1^T * kappa_1
//   d F / d W_i = sums of kappa_i h_{i-1} and of e_i hd_{i-1},   d F / d b_i = sum_p kappa_i
//   d F / d w   = r sum_p act'(z_depth) zd_depth
// The gradient that reaches the image multiplies r, and everything is linear in that.
// clang-format on
#pragma once

#include "common/activations.h"
#include "loss_image/loss_image.h"

namespace auxfast::AUXFAST_ISA {

template <class Act, class V>
struct PixelMath {
  // e, from the activation's state (activations.h) and the gradient that reaches act(z).
  static AUXFAST_HD V delta(V state, V gradient) { return Act::slope(state) * gradient; }

  // kappa without its first term, which is the last layer's, and with it.
  static AUXFAST_HD V kappa(V state, V zd, V e) { return Act::relative_curvature(state) * zd * e; }
  static AUXFAST_HD V kappa(V state, V zd, V e, V gradient) {
    return Act::slope(state) * gradient + kappa(state, zd, e);
  }
};

}  // namespace auxfast::AUXFAST_ISA
