"""Read, check and write model folders and files."""

from .dense import dense_copy as dense_copy
from .finite import check_finite as check_finite
from .load import load_model as load_model
from .load import load_tokenizer as load_tokenizer
from .manifest import Verification as Verification
from .manifest import verify_folder as verify_folder
from .manifest import write_manifest as write_manifest
from .quiet import quiet as quiet
from .source import Source as Source
from .source import empty_model as empty_model
from .source import open_source as open_source
from .write import check_target as check_target
from .write import write_checkpoint as write_checkpoint
