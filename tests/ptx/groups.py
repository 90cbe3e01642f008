# SPDX-License-Identifier: Apache-2.0
"""Groups of asynchronous operations, which threads commit and wait for: those of cp.async, of bulk copies, of wgmma."""

import numpy as np


class Groups:
    """Operations in flight, and how many groups each thread (or warpgroup) has committed.

    An operation is (who has begun it, the number of the group that each of them puts it into, columns, what): columns
    are arrays with an element for each of those who have begun it.
    """

    def __init__(self, count):
        self.committed = np.zeros(count, np.int64)
        self.flying = []

    def begin(self, who, what, *columns):
        self.flying.append((who, self.committed[who], columns, what))

    def commit(self, who):
        self.committed[who] += 1

    def wait(self, waiting, keep):
        """(who, what, *columns) of operations in all groups but the last `keep` of those who wait, in order."""
        waits = np.zeros(len(self.committed), bool)
        waits[waiting] = True
        done, left = [], []
        for who, group, columns, what in self.flying:
            over = waits[who] & (group < self.committed[who] - keep)
            if over.any():
                done.append((who[over], what, *(column[over] for column in columns)))
            if not over.all():
                left.append((who[~over], group[~over], tuple(column[~over] for column in columns), what))
        self.flying = left
        return done
