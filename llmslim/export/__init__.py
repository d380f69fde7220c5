"""A slim model elsewhere: as an ordinary dense one, as a GGUF file, as ONNX, on the hub."""

from .dense import dense_copy as dense_copy
from .gguf import check_gguf_export as check_gguf_export
from .gguf import write_gguf as write_gguf
from .hub import check_repo as check_repo
from .hub import plan_upload as plan_upload
from .hub import push as push
from .onnx import check_onnx_export as check_onnx_export
from .onnx import write_onnx as write_onnx
