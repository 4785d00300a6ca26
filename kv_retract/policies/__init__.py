"""Detectors: they read messages and propose spans to take back. Importing this registers the built-in ones."""

from .asking import Asked, Asker, AsyncRetractionPolicy, PolicyFailure, ask_all
from .base import POLICIES, PolicyContext, RetractionPolicy, register_policy
from .classifier import ClassifierDetector
from .composed import AllOf, AnyOf, Cooldown, MinConfidence
from .contradicted import ContradictedValue
from .detectors import Detector, Found, PatternDetector
from .expired import Expired
from .explicit import Explicit
from .heuristics import HeuristicInjectionDetector
from .injection import InjectedInstruction
from .overlaps import proposal_id
from .oversized import Oversized
from .reading import policies_from, policy_from, read_policies
from .repeated_error import RepeatedError
from .secret import ExposedSecret, SecretDetector
from .superseded import SupersededToolResult
from .supervised import DryRun, RequireApproval
from .tool_error import ToolErrorRecovered
from .user_revoked import UserRevoked

__all__ = [
    "POLICIES",
    "AllOf",
    "AnyOf",
    "Asked",
    "Asker",
    "AsyncRetractionPolicy",
    "ClassifierDetector",
    "ContradictedValue",
    "Cooldown",
    "Detector",
    "DryRun",
    "Expired",
    "Explicit",
    "ExposedSecret",
    "Found",
    "HeuristicInjectionDetector",
    "InjectedInstruction",
    "MinConfidence",
    "Oversized",
    "PatternDetector",
    "PolicyContext",
    "PolicyFailure",
    "RepeatedError",
    "RequireApproval",
    "RetractionPolicy",
    "SecretDetector",
    "SupersededToolResult",
    "ToolErrorRecovered",
    "UserRevoked",
    "ask_all",
    "policies_from",
    "policy_from",
    "proposal_id",
    "read_policies",
    "register_policy",
]
