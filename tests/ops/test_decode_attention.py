"""``decode_attention``: every face and the door, by its declaration; then what is particular."""

from pyllm.ops import decode_attention
from pyllm.ops._registry import face_module
from pyllm.testing.cases.decode_attention import DECODE_ATTENTION
from pyllm.testing.suite import InferenceSuite


class TestDecodeAttention(InferenceSuite):
    operation = DECODE_ATTENTION
    door = staticmethod(decode_attention)
    find_face = staticmethod(face_module)
