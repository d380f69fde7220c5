"""Text for calibration and training: read, tokenised, cut into windows or packed into rows."""

from .healing import HealingText as HealingText
from .healing import healing_text as healing_text
from .hub import hub_name as hub_name
from .messages import Conversation as Conversation
from .messages import Document as Document
from .messages import Message as Message
from .messages import replace_surrogates as replace_surrogates
from .packing import Rows as Rows
from .packing import collate as collate
from .packing import collate_apart as collate_apart
from .packing import collate_flat as collate_flat
from .sources import read_texts as read_texts
from .vocabulary import check_ids as check_ids
from .vocabulary import embedding_rows as embedding_rows
from .vocabulary import longest_input as longest_input
from .windows import Windows as Windows
from .windows import calibration_windows as calibration_windows
from .windows import first_windows as first_windows
