"""Text for calibration and training: read, tokenised, cut into windows."""

from .columns import Document as Document
from .columns import Message as Message
from .text import read_texts as read_texts
from .windows import Windows as Windows
from .windows import calibration_windows as calibration_windows
