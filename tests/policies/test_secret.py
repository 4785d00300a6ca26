import base64
import json
import random
import re
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_retract.errors import PolicyError
from kv_retract.policies import POLICIES, PolicyContext
from kv_retract.policies.detectors import PatternDetector
from kv_retract.policies.secret import DEFAULT_SECRET_KINDS, SECRET_KINDS, ExposedSecret, SecretDetector
from kv_retract.policies.secret_kinds import entropy, github_checksum, iban_is_valid, luhn
from kv_retract.testing.policies import PolicyConformance
from kv_retract.trace import read_traces
from kv_retract.types import Guarantee, Message, SpanRef, ToolCall

DATA = Path(__file__).parents[3] / "shared" / "data"
LETTERS = string.ascii_letters + string.digits


def drawn(rng, length, alphabet=LETTERS):
    return "".join(rng.choice(alphabet) for _ in range(length))


def card(rng, prefix, length):
    body = prefix + drawn(rng, length - len(prefix) - 1, string.digits)
    return next(body + digit for digit in string.digits if luhn(body + digit))


def iban(rng, country, length):
    body = drawn(rng, length - 4, string.digits)
    digits = "".join(str(int(c, 36)) for c in body + country + "00")
    return f"{country}{98 - int(digits) % 97:02}{body}"


def token(rng):
    def part(value):
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    return f"{part({'alg': 'HS256', 'typ': 'JWT'})}.{part({'sub': drawn(rng, 8)})}.{drawn(rng, 43)}"


def github(rng):
    body = drawn(rng, 30)
    return "ghp_" + body + github_checksum(body)


def pem(rng):
    lines = "\n".join(drawn(rng, 64) for _ in range(6))
    return f"-----BEGIN RSA PRIVATE KEY-----\n{lines}\n-----END RSA PRIVATE KEY-----"


# Built from parts, so that scanners of repositories do not take these lines for keys.
MAKERS = {
    "AWS access key": lambda rng: "AKIA" + drawn(rng, 16, string.ascii_uppercase + "234567"),
    "GitHub token": github,
    "GitLab token": lambda rng: "glpat" + "-" + drawn(rng, 19) + "7",
    "OpenAI or Anthropic key": lambda rng: "sk" + "-proj-" + drawn(rng, 45) + "aB3",
    "Slack token": lambda rng: "xoxb" + f"-{drawn(rng, 11, string.digits)}-{drawn(rng, 24)}",
    "Google API key": lambda rng: "AIza" + drawn(rng, 34) + "7",
    "Stripe key": lambda rng: "sk_" + "live_" + drawn(rng, 23) + "7",
    "npm token": lambda rng: "npm" + "_" + drawn(rng, 35) + "7",
    "Hugging Face token": lambda rng: "hf" + "_" + drawn(rng, 33) + "7",
    "JSON web token": token,
    "private key": pem,
    "card number": lambda rng: card(rng, *rng.choice([("4", 16), ("53", 16), ("37", 15), ("6011", 16), ("36", 14)])),
    "IBAN": lambda rng: iban(rng, *rng.choice([("DE", 22), ("NO", 15), ("FR", 27), ("MT", 31)])),
}
AROUND = ("{}", "It is {}, they said.", '{{"value": "{}", "n": 1}}', "- key: {}\n  id: 3", "({})", "first\n{}\nlast")


def taken(text, **parameters):
    return [(f.label, text[f.start : f.end]) for f in SecretDetector(**parameters)(text)]


class TestContract(PolicyConformance):
    results = ("a result", "password: hunter2!", "4111 1111 1111 1111", "4111 1111 1111 1112", "")
    texts = ("hello", "my password is hunter2!", "")
    arguments = ('{"password": "hunter2!"}', "{broken 4111111111111111", "")

    @pytest.fixture(params=[{}, {"kinds": SECRET_KINDS}, {"arguments": False}])
    def policy(self, request):
        return ExposedSecret(**request.param)

    @pytest.fixture
    def thread(self):
        return [Message("user", "pay with 4111 1111 1111 1111 please")]


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("kind", MAKERS)
def test_drawn_secrets_are_found_and_nothing_beside_them(kind, around):
    rng = random.Random(f"{kind} {around}")
    for _ in range(50):
        secret = MAKERS[kind](rng)
        if around.startswith("{{"):
            secret = json.dumps(secret)[1:-1]
        assert taken(around.format(secret)) == [(kind, secret)]


@pytest.mark.parametrize("kind", ["GitHub token", "card number", "IBAN", "JSON web token"])
def test_a_wrong_check_digit_lowers_or_ends_it(kind):
    rng = random.Random(kind)
    for _ in range(50):
        secret = MAKERS[kind](rng)
        at = 2 if kind == "JSON web token" else -1
        wrong = secret[:at] + next(c for c in "3579" if c != secret[at]) + (secret[at:][1:] if at > 0 else "")
        finds = SecretDetector()(wrong)
        assert not finds or (kind == "GitHub token" and finds[0].confidence == 0.7)


@given(st.from_regex(r"[0-9]{12,18}", fullmatch=True))
def test_luhn_notices_every_wrong_digit(digits):
    number = next(digits + last for last in "0123456789" if luhn(digits + last))
    for at in range(len(number)):
        wrong = number[:at] + str((int(number[at]) + 1) % 10) + number[at + 1 :]
        assert not luhn(wrong)


def test_known_numbers():
    assert luhn("4111111111111111") and not luhn("4111111111111112")
    assert iban_is_valid("GB82 WEST 1234 5698 7654 32") and iban_is_valid("DE89370400440532013000")
    assert not iban_is_valid("GB82 WEST 1234 5698 7654 33") and not iban_is_valid("US133000000121212121212")
    assert not iban_is_valid("") and not iban_is_valid("DE8937040044053201300")
    assert entropy("") == 0 and entropy("aaaa") == 0 and entropy("abcd") == 2


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("password: hunter2!", ["hunter2!"]),
        ("Password = 'correct horse battery'", ["correct horse battery"]),
        ('{"user": "a", "password": "zxc\\"vb"}', ['zxc\\"vb']),
        ('{"body": "{\\"password\\": \\"hunter2\\"}"}', ["hunter2"]),
        ("DB_PASSWORD=s3cr3t-4u\nDB_USER=me", ["s3cr3t-4u"]),
        ("my password is hunter2!x, thanks", ["hunter2!x"]),
        ("client_secret: 8f3b2c91d0aa47e6", ["8f3b2c91d0aa47e6"]),
        ("password: ********", []),
        ("password: <your password>", []),
        ('"password": null, "secret": "none"', []),
        ("password = os.environ['DB_PASSWORD']", []),
        ("self.password = password", []),
        ("def login(user, password: str) -> bool:", []),
        ("if not password:\n    raise ValueError", []),
        ("Reset your password: https://example.com/reset?id=42", []),
        ("The secret: patience. My password is secure.", []),
        ("The password is required to have 8 characters", []),
        ("api_key: string", []),
        ('access_token: "token"', []),
    ],
)
def test_passwords_and_fields(text, values):
    assert [value for _, value in taken(text)] == values


@pytest.mark.parametrize(
    "text",
    [
        "credit_card_7815826 gift_card_1234567 certificate_9504747",
        "reservation 4WQ150, flight HAT001, born 1990-08-12",
        "order 1234567812345678 at 1700000000000000000 ns",
        "1.4111111111111111 and 0x4111111111111111 and 4111111111111111.5",
        "4111-1111-1111-1111-1111-1111",
        "sk-toggleable__label-arrow-with-2-lines-of-text and task-2024-a-b-c-d-e-f-g-h",
        "https://example.com/AKIAabc ghp_short eyJ.eyJ.x hf_transfer",
        "-----BEGIN PUBLIC KEY-----\nabc\n-----END PUBLIC KEY-----",
    ],
)
def test_what_only_looks_like_it_is_left_alone(text):
    assert taken(text) == []


def test_addresses_and_numbers_only_on_request():
    text = "mail ann.lee+x@mail.example.co.uk or call +49 170 1234567 or (415) 555-2671, ratio 26.830187"
    assert taken(text) == []
    assert [value for _, value in taken(text, kinds=SECRET_KINDS)] == [
        "ann.lee+x@mail.example.co.uk",
        "+49 170 1234567",
        "(415) 555-2671",
    ]


def test_allowed_values_stay():
    text = "4111 1111 1111 1111 and 5555 5555 5555 4444"
    assert [value for _, value in taken(text, allow=("4111*",))] == ["5555 5555 5555 4444"]
    assert taken(text, kinds=("IBAN",)) == []


def test_any_role_and_arguments_with_exact_ranges(threads):
    context = threads.ctx(
        threads.user("pay with 4111 1111 1111 1111."),
        threads.call("pay", {"card": "5555555555554444", "n": 1}, "paid by 4111111111111111"),
        [Message("system", "password: hunter2!")],
    )
    found = ExposedSecret().propose(context)
    assert [r.span for r in found] == [
        SpanRef(0, "content", 0, 9, 28),
        SpanRef(1, "tool_call", 0, 10, 26),
        SpanRef(2, "content", 0, 8, 24),
        SpanRef(3, "content", 0, 10, 18),
    ]
    assert {r.guarantee for r in found} == {Guarantee.EXACT}
    assert not any(re.search(r"4111|5555|hunter", r.reason) for r in found)
    assert [r.span.message for r in ExposedSecret(roles=("assistant", "tool"), arguments=False).propose(context)] == [2]


def test_second_call_of_a_message():
    calls = (ToolCall("a", "x", "{}"), ToolCall("b", "y", '{"password": "hunter2!"}'))
    [retraction] = ExposedSecret().propose(
        PolicyContext(thread_id="t", messages=[Message("assistant", tool_calls=calls)])
    )
    assert retraction.span == SpanRef(0, "tool_call", 1, 14, 22)


def test_further_detectors_join_what_overlaps(threads):
    own = PatternDetector(patterns={"customer": r"C-\d{6}|card \d+"})
    policy = POLICIES.create("secret", detectors=[own], guarantee="steered")
    context = threads.ctx(threads.user("C-123456 has card 4111111111111111"))
    found = policy.propose(context)
    assert [(r.span.start, r.span.end) for r in found] == [(0, 8), (13, 34)]
    assert found[0].reason.endswith("customer") and found[0].guarantee is Guarantee.STEERED
    assert [(r.span.start, r.span.end) for r in ExposedSecret(min_confidence=0.99).propose(context)] == []


@pytest.mark.parametrize(
    "parameters", [{"kinds": ("pin",)}, {"kinds": "IBAN"}, {"allow": "x"}, {"roles": "user"}, {"min_confidence": -1}]
)
def test_parameters_that_are_not_what_they_should_be(parameters):
    with pytest.raises(PolicyError, match="expected"):
        ExposedSecret(**parameters)


def test_default_kinds_are_known():
    assert set(SECRET_KINDS) - set(DEFAULT_SECRET_KINDS) == {"e-mail address", "phone number"}


@pytest.mark.parametrize("name", ["tau_bench/airline_trajectories.jsonl", "swe_agent", "reflexion_hotpotqa"])
def test_real_threads_hold_no_secrets_but_addresses(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"the public data set {name} is not beside this checkout")
    everything = ExposedSecret(kinds=SECRET_KINDS)
    for trace in read_traces(path):
        context = PolicyContext(thread_id="t", messages=trace.messages)
        assert ExposedSecret().propose(context) == []
        assert {r.reason.rsplit(": ", 1)[1] for r in everything.propose(context)} <= {"e-mail address"}
