# SPDX-License-Identifier: Apache-2.0
"""The lessons in the order in which they are listed."""

from ._blobs import BLOBS
from ._by_hand import BY_HAND
from ._chain_rule import CHAIN_RULE
from ._digits import DIGITS
from ._gates import GATES_LESSON
from ._sweep import SWEEP
from ._worked_step import WORKED_STEP
from ._xor import XOR
from ._xor_deep import XOR_DEEP

ORDER = (GATES_LESSON, CHAIN_RULE, WORKED_STEP, BY_HAND, XOR, XOR_DEEP, BLOBS, DIGITS, SWEEP)
LESSONS = {lesson.name: lesson for lesson in ORDER}
