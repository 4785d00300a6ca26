"""kv-retract: take spans of an agent's context back, out of its KV cache, before the next step.

What most programs need is here; `docs/structure.md` says where the rest lies. Importing loads neither torch nor a
framework: models are loaded by `KVRetractSession.from_pretrained` and by the modules below `kv_retract.engine`.
"""

from .engine.base import Engine
from .erasers import ERASERS, Eraser, register_eraser
from .errors import KVRetractError
from .events import Event, Observer
from .healing import Healing
from .ledger.ledger import Ledger, MemoryLedger, SqliteLedger
from .ledger.lineage import Lineage
from .ledger.messages import message_from_openai, message_to_openai
from .ledger.render import Renderer
from .planner import Planner
from .policies import (
    POLICIES,
    Explicit,
    PolicyContext,
    RetractionPolicy,
    SupersededToolResult,
    ToolErrorRecovered,
    register_policy,
)
from .session import KVRetractSession
from .types import (
    Cascade,
    Divergence,
    EraseResult,
    Guarantee,
    Message,
    Retraction,
    RetractionPlan,
    RetractionRecord,
    SamplingParams,
    Scope,
    SpanRef,
    Status,
    StepDelta,
    StepResult,
    ToolCall,
    Waiting,
)

__version__ = "0.1.0"

__all__ = [
    "ERASERS",
    "POLICIES",
    "Cascade",
    "Divergence",
    "Engine",
    "EraseResult",
    "Eraser",
    "Event",
    "Explicit",
    "Guarantee",
    "Healing",
    "KVRetractError",
    "KVRetractSession",
    "Ledger",
    "Lineage",
    "MemoryLedger",
    "Message",
    "Observer",
    "Planner",
    "PolicyContext",
    "Renderer",
    "Retraction",
    "RetractionPlan",
    "RetractionPolicy",
    "RetractionRecord",
    "SamplingParams",
    "Scope",
    "SpanRef",
    "SqliteLedger",
    "Status",
    "StepDelta",
    "StepResult",
    "SupersededToolResult",
    "ToolCall",
    "ToolErrorRecovered",
    "Waiting",
    "message_from_openai",
    "message_to_openai",
    "register_eraser",
    "register_policy",
]
