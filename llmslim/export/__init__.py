"""A slim model in other forms: an ordinary dense one, a GGUF file."""

from .dense import dense_copy as dense_copy
from .gguf import check_gguf_export as check_gguf_export
from .gguf import write_gguf as write_gguf
