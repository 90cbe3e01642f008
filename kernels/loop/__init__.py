# SPDX-License-Identifier: Apache-2.0
"""Whole training loops in plain torch: forward, backward and update written out, without autograd.

The CPU implementation, and the definition of correct for the training kernels. All buffers are made once; a step
is a list of calls that write into them. A bias is one more column of its weight, met by a 1 in the layer's input,
so a layer takes one product forward, one backward and one for its update. With h[0] = x and, for any cross entropy of
probabilities t, dz = p - t at the output:

    dz[l - 1] = (dz[l] @ weight[l]) * act'(h[l])        dweight[l] = dz[l].T @ h[l]
"""

from .loop import TorchLoop

__all__ = ["TorchLoop"]
