"""``kv_append``: every face and the door, by its declaration; then what is particular to it."""

from pyllm.ops import kv_append
from pyllm.ops._registry import face_module
from pyllm.testing.cases.kv_append import KV_APPEND
from pyllm.testing.suite import InferenceSuite


class TestKvAppend(InferenceSuite):
    operation = KV_APPEND
    door = staticmethod(kv_append)
    find_face = staticmethod(face_module)
