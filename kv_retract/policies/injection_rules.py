"""Signs that a text speaks to the model that reads it: phrases, with the weight that each has as evidence.

General turns of phrase, in many wordings, rather than the texts of one benchmark. In patterns a space stands for
white space, ` ?` for that or none (bounded, since who writes the text chooses how long matching takes), and `{ai}` for
the names that a model is called by.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, TypeAlias

Extent: TypeAlias = Literal["line", "sentence", "match"]
"""How much a sign takes with it: the sentence it stands in; that and the rest of the line; or only itself."""


class Rule(NamedTuple):
    """One kind of sign."""

    label: str
    """Several rules may have one label: then they are one piece of evidence."""
    needles: tuple[str, ...]
    """Small letters: a text without all of them is not searched."""
    pattern: re.Pattern[str]
    """Where a group `begins` takes part, the passage begins with the sign itself, not with the sentence around it."""
    weight: float
    """Probability that the passage is an injection, had one nothing but this sign; an estimate, not measured."""
    extent: Extent


_AI = (
    r"(?:an?|the|this|any|all|every) ?(?:ai|llm|(?:large )?language model|chat ?bot|(?:ai|llm|virtual|automated)[\s-]"
    r"(?:assistant|agent|model|system)|assistant)s?\b|(?:ai|llm|chat ?bot|chatgpt|gpt-?\d|claude|gemini|copilot|"
    r"(?:ai|llm)[\s-](?:assistant|agent|model|system)|assistant)s?\b"
)
# A call for attention, or a capital letter behind another letter: text that was put in often lacks the space before it.
_GLUED = r"(?-i:(?=[A-Z][a-z]))"
_URGENT = (
    r"(?P<begins>(?:(?-i:IMPORTANT|ATTENTION|URGENT|WARNING)|\b(?:important|attention|urgent|warning|notice|stop))\b"
    rf"[\s!:.*-]{{0,40}}|(?<=\S){_GLUED})?(?:\b|{_GLUED})"
)
_INSTRUCTIONS = (
    r"\w{0,4}(?:structions?|directives?|commands?|prompts?|orders|guidelines|rules|constraints|guardrails|programming|"
    r"training|context)\b"
)
_EARLIER = r"(?:previous|prior|earlier|preceding|above|former|foregoing|initial|original|existing|past)"
_TASK = r"(?:task|question|request|query|prompt|instructions?|job|problem)s?\b"
_SAY = r"(?:state|say|tell|print|output|reply|respond|answer|write|repeat|give|return|report|do|follow)\b"
_OVERRIDE, _FIRST = "override of earlier instructions", "another task before the user's"
_ADDRESSED, _ROLE = "message to the model", "text that poses as a system message"
_SECRECY, _ANSWER, _DEMAND = "secrecy towards the user", "answer dictated to the model", "demand for a secret"
_TOOLS, _STOP, _STORY = "tool use dictated to the model", "order to stop the task", "role or fiction for the model"


def _rule(label: str, weight: float, extent: Extent, needles: str, pattern: str) -> Rule:
    pattern = pattern.replace("{ai}", f"(?:{_AI})").replace(" ?", r"\s{0,40}").replace(" ", r"\s{1,40}")
    return Rule(label, tuple(needles.split("|")), re.compile(pattern, re.IGNORECASE), weight, extent)


RULES = (
    _rule(
        _OVERRIDE, 0.9, "line", "ignor|disregard|forget|overrid|overlook|discard|bypass|follow|obey",
        rf"{_URGENT}(?:ignor(?:e|ing)|disregard|forget|override|overlook|discard|bypass|(?:do not|don't|stop) "
        rf"(?:follow|obey)(?:ing)?) (?:\w+ ){{0,4}}(?:{_EARLIER}|all|any|your) (?:\w+ ){{0,3}}{_INSTRUCTIONS}",
    ),
    _rule(
        _OVERRIDE, 0.8, "line", "ignor|disregard|forget",
        rf"{_URGENT}(?:ignore|disregard|forget) (?:everything|anything|all|what|the)(?: \w+){{0,3}} (?:above|before|"
        rf"function|table|code|text|data|document|paper|article|rest)\b[^.\n]{{0,60}}?\b(?:and|instead|but)\b[\s,]*{_SAY}",
    ),
    _rule(
        _OVERRIDE, 0.9, "line", "instru|indicac|consignes|anweisung|vorgaben|istruzioni",
        r"\b(?:olvid|ignor|descart|esque[cç]|desconsider|oubli|dimentic|trascur|vergiss|vergessen|missacht)\w*(?: \w+)"
        r"{1,4} (?:instrucciones|indicaciones|instru[cç][oõ]es|consignes|instructions|istruzioni|anweisungen|"
        r"instruktionen|vorgaben)\b",
    ),
    _rule(
        _OVERRIDE, 0.9, "line", "οδηγίες|инструкц|указан|指|命令|提示|지시|명령|지침|निर्देश|instruksi|perintah",
        r"αγν[οό]ή?[σ]\w*[^.\n]{1,40}οδηγίες|\b(?:про)?(?:игнорируй|забудь)\w*[^.\n]{1,40}(?:инструкци|указани)\w+"
        r"|(?:忽略|无视|無視|忘记|忘記)[^。\n]{0,10}(?:指示|指令|说明|命令|提示)|(?:指示|命令|指令)[^。\n]{0,6}(?:無視|忘れ)"
        r"|(?:지시|명령|지침)[^.\n]{0,8}(?:무시|잊)|निर्देश[^।\n]{0,30}(?:अनदेखा|नज़रअंदाज़|भूल)"
        r"|\babaikan(?: \w+){0,4} (?:instruksi|perintah)",
    ),
    _rule(
        _OVERRIDE, 0.45, "line", "following|new",
        r"\b(?:adhere to|follow|obey|comply with|execute) (?:only )?(?:the following|th(?:is|ese) (?:new )?) ?"
        r"(?:instruction|command|order|directive)s?\b ?:",
    ),
    _rule(
        _FIRST, 0.5, "line", "before",
        rf"\bbefore (?:you )?(?:can |could |may |will )?(?:solv|answer|do|complet|continu|perform|respond|repl|finish|"
        rf"proceed|process|summari[sz]|return)\w* (?:\w+ ){{0,4}}{_TASK}",
    ),
    _rule(
        _FIRST, 0.5, "line", "first",
        r"\b(?:do|perform|execute|complete) (?:the following|this|these)(?: \w+)? first\b",
    ),
    _rule(
        _FIRST, 0.6, "line", "you can|you may|you should",
        rf"\b(?:after|once|when) (?:you|doing|that)[^.\n]{{0,40}}, you (?:can|may|should) (?:then |now )?(?:solve|"
        rf"answer|continue|go on|resume|proceed|return|complete)\w*[^.\n]{{0,20}} {_TASK}",
    ),
    _rule(
        _FIRST, 0.6, "line", "gave you|asked you|given you",
        rf"\b{_TASK} (?:that |which )?(?:i|the user|he|she|they) (?:gave|asked|has given|have given) you\b",
    ),
    _rule(
        _ADDRESSED, 0.6, "line", "to you|for you",
        r"\bmessage from (?:me|the user|your)\b[^.\n]{0,60}(?:\n[^.\n]{0,60})? (?:to|for) you\b",
    ),
    _rule(
        _ADDRESSED, 0.6, "line", "ai|llm|model|assistant|agent|bot|gpt|claude|gemini|copilot",
        r"\b(?:attention|dear|note (?:to|for)|notice (?:to|for)|messages? (?:to|for)|instructions? (?:to|for)|if you "
        r"are|you are now)[,:]? {ai}",
    ),
    _rule(_ADDRESSED, 0.4, "sentence", "as an ai|as a l", r"\bas (?:an ai|a (?:large )?language model)\b"),
    _rule(
        _ADDRESSED, 0.5, "line", "your",
        r"\bi(?:'m| am) your (?:developer|creator|programmer|administrator|admin|operator)\b",
    ),
    _rule(_ADDRESSED, 0.6, "line", "instructed", r"\byou(?:'ve| have) been instructed to\b"),
    _rule(
        _STORY, 0.7, "line", "anything now|developer mode|jailb|unrestricted",
        r"\bdo anything now\b|"
        r"\b(?:you are|enter|activate|enable)[^.\n]{0,20} (?:developer mode|jailbr\w+|unrestricted)\b",
    ),
    _rule(
        _STORY, 0.3, "sentence", "imagine|pretend|act as|role|universe|world",
        r"\b(?:imagine|pretend) (?:that )?(?:you|we)(?:'re| are)\b|\bact as (?:if|an?)\b|\bthe role of\b|"
        r"\bin an? (?:\w+ )?(?:universe|world|reality)\b",
    ),
    _rule(
        _ROLE, 0.8, "line", "system|admin|developer",
        r"(?P<begins>(?:#{2,6} ?[(\[<] ?(?:system|admin|developer|instruction)s?[\s_-]*(?:message|prompt|note|mode|"
        r"override)?|[\[(<] ?(?:system|admin|developer)[\s_-]*(?:message|prompt|mode(?: activated)?|override|"
        r"instruction))s? ?[\])>]:?)",
    ),
    _rule(
        _ROLE, 0.8, "line", "im_start|header_id|[inst]|<<sys>>",
        r"(?P<begins><\|im_start\|>(?:system|user|assistant)?|<\|start_header_id\|>|<<SYS>>|\[INST\])",
    ),
    _rule(
        _ROLE, 0.3, "line", "system",
        r"(?P<begins><system>|\[system\]|#{2,6} ?system\b:?|\bsystem (?:message|prompt|override|notice) ?:)",
    ),
    _rule(
        _SECRECY, 0.6, "sentence", "user|human",
        r"\b(?:do not|don't|never|without) (?:tell|mention|inform|notify|alert|reveal|disclos|ask)\w*[^.\n]{0,30} "
        r"(?:the |your )(?:user|human)\b",
    ),
    _rule(
        _SECRECY, 0.35, "sentence", "without",
        r"\bwithout (?:asking|telling|informing|notifying|confirming)(?: with)? (?:me|the user|anyone|for "
        r"confirmation)\b",
    ),
    _rule(
        _DEMAND, 0.4, "sentence", "prompt|secret|passw|passc|passp|confidential|instructions",
        r"(?<!never\s)(?<!not\s)(?<!n't\s)\b(?:reveal|print|show|repeat|output|tell|give|share|disclose|confirm|"
        r"provide|what is)(?: me| us)? (?:your|the) (?:\w+ ){0,2}(?:system prompt|initial prompt|secret key|secret|"
        r"password|passcode|passphrase|hidden instructions|instructions above)\b",
    ),
    _rule(
        _ANSWER, 0.4, "sentence", "output|answer|result|conclusion|sum",
        r"\b(?:state|say|claim|report|consider|treat|respond|reply) (?:that )?(?:the |its )?(?:output|answer|result|"
        r"sum|total|conclusion)s? (?:is|as|to be|are)\b",
    ),
    _rule(
        _ANSWER, 0.5, "sentence", "output|answer|result|conclusion|sum",
        r"\b(?:let us|let's|you should|you must|please|suggest you|suggest that you|we might|want you)(?: to| now)? "
        r"(?:state|say|claim|report|consider|treat|assume|respond|reply) (?:that )?(?:the |its )?(?:output|answer|"
        r"result|sum|total|conclusion)\b(?: \w+){0,4} (?:is|as|to be)\b",
    ),
    _rule(_ANSWER, 0.4, "sentence", "instead", r"\b(?:reply|respond|answer|say|output|print)\b[^.\n]{1,60} instead\b"),
    _rule(_STOP, 0.6, "line", "stop", r"\bstop what(?:ever)? you(?:'re| are)(?: currently)? doing\b"),
    _rule(
        _TOOLS, 0.6, "line", "tool|function",
        r"\b(?:you (?:should|must|need to|have to)|please|then|first|finally)(?: \w+){0,2} (?:use|call|invoke|run) the "
        r"(?:tool|function)\b",
    ),
    _rule("task in the data", 0.4, "line", "todo", r"(?P<begins>\bTODO:) (?:please )?[a-z]{2,12} "),
    _rule(
        "invisible text", 0.9, "match", "\U000e0020|\U000e0061|\U000e0065|\U000e0069|\U000e006f|\U000e0074",
        "[\U000e0020-\U000e007f]{4,}",  # Unicode tags: letters that no reader sees and tokenizers read
    ),
)  # fmt: skip


class Block(NamedTuple):
    """A way of marking a part of a text as instructions, or of hiding it."""

    opening: re.Pattern[str]
    closing: str
    """What ends it; `{name}` stands for the first group of `opening`."""
    weight: float
    """Of standing in such a block, for text that shows another sign."""


BLOCKS = (
    Block(re.compile(r"<!--"), "-->", 0.3),
    Block(
        re.compile(r"<(\w+)[^<>]*\b(?:display:\s*none|visibility:\s*hidden|font-size:\s*0|hidden)\b[^<>]*>"),
        "</{name}>",
        0.3,
    ),
    Block(
        re.compile(
            r"<(information|info|important|system|instructions?|admin|assistant|developer|prompt|override|urgent|notice|"
            r"alert|attention|priority|hidden|secret|command)\b[^<>\n]{0,40}>",
            re.IGNORECASE,
        ),
        "</{name}>",
        0.3,
    ),
    Block(re.compile(r"\[(inst|system|important|instructions?)\]", re.IGNORECASE), "[/{name}]", 0.3),
    Block(re.compile(r"<\|im_start\|>"), "<|im_end|>", 0.3),
    Block(re.compile(r"<<SYS>>"), "<</SYS>>", 0.3),
)
