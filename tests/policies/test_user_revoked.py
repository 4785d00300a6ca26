"""Withdrawals of a user: hand-made dialogues, the synthetic corpus, and real threads in which nobody withdraws."""

import sys
import time
from pathlib import Path

import pytest

from kv_retract.errors import PolicyError
from kv_retract.policies import POLICIES, PolicyContext
from kv_retract.policies.user_revoked import UserRevoked
from kv_retract.testing.policies import PolicyConformance, retracted_text
from kv_retract.trace import Trace, read_traces
from kv_retract.training.corpus import samples, training_families
from kv_retract.types import Guarantee, Message, SpanRef

DATA = Path(__file__).parents[3] / "shared" / "data"

# One line per dialogue: turns of the user, and of the assistant behind "A: ". What is withdrawn stands in [[ ]]. The
# rules were made on the first half; the second half was written before them and only measured.
DEVELOPED = (
    # withdrawn or replaced
    ("[[I'd like a window seat.]] And a vegetarian meal, please.", "A: Noted.", "Actually, make it aisle."),
    (
        "[[My seat preference is the window.]]",
        "A: Noted.",
        "My meal is vegetarian.",
        "A: Fine.",
        "Forget my seat preference.",
    ),
    ("[[I am vegetarian.]] I fly on Monday.", "A: Noted.", "By the way, I'm no longer vegetarian."),
    ("[[Please book the hotel near the station.]]", "A: Sure.", "Scratch that."),
    ("[[I want to stay at the Lakeside hotel.]] We are two adults.", "A: Noted.", "I changed my mind about the hotel."),
    (
        "[[My budget is 900 dollars.]]",
        "A: Noted.",
        "Find flights to Rome.",
        "A: Here are three.",
        "Please disregard what I said about the budget.",
    ),
    ("[[Can you book a table for 21 May?]]", "A: Sure, for how many?", "Sorry, I meant 12 May, not 21."),
    (
        "[[Ship it to 14 Mill Lane.]] Gift wrap it, please.",
        "A: Will do.",
        "Please ignore what I told you about shipping to Mill Lane.",
    ),
    ("[[My phone number is 555-0134.]]", "A: Saved.", "Thanks.", "A: Welcome.", "My phone number is now 555-0199."),
    ("[[Let's meet on Tuesday at the office.]]", "A: Okay.", "On second thought, let's make it Thursday."),
    ("I need a car from Friday. [[It should be an automatic.]]", "A: Sure.", "Never mind that."),
    (
        "[[I prefer answers in German.]]",
        "A: Gern.",
        "What is the weather?",
        "A: Sonnig.",
        "From now on I prefer answers in English.",
    ),
    (
        "[[I'd like two nights in Lisbon]], and I need parking.",
        "A: Noted.",
        "Actually, I'd like three nights in Lisbon.",
    ),
    ("[[Use PostgreSQL for the database.]] Write tests with pytest.", "A: Okay.", "Use SQLite instead of PostgreSQL."),
    (
        "[[I'm allergic to peanuts.]]",
        "A: I will remember.",
        "Suggest a dinner.",
        "A: Pad Thai without peanuts.",
        "I'm not allergic to peanuts any more, the doctor says.",
    ),
    (
        "[[I need a wheelchair at the gate.]] My name is in the booking.",
        "A: Noted.",
        "I don't need the wheelchair after all.",
    ),
    ("[[My daughter will travel with me.]] We leave in June.", "A: Lovely.", "Forget what I said about my daughter."),
    ("[[Make the title blue.]]", "A: Done.", "No wait, make it green instead."),
    # nothing to take back
    ("I'd like a window seat.", "A: Noted.", "Please don't forget my seat."),
    ("I'd like a window seat.", "A: Noted.", "Did you forget my seat?"),
    ("I booked a flight with insurance.", "A: There is none.", "Actually, I did purchase insurance."),
    ("Find me a cheap hotel.", "A: There is none.", "Forget it, bye."),
    ("I'd like a window seat.", "A: There is none.", "Never mind, thanks for your help!"),
    ("My seat is 14C.", "A: Noted.", 'My husband said "forget my seat", isn\'t that funny?'),
    ("I live in Rome.", "A: Noted.", "Actually, that is a great idea."),
    ("Book the train to Kiel.", "A: Which class?", "Second class, please."),
    ("I prefer tea.", "A: Noted.", "I never forget a face."),
    ("Please write the report.", "A: Done.", "Ignore the linter warnings in the report and go on."),
    ("My hotel is the Astoria.", "A: Noted.", "Let us not forget my hotel."),
    ("My dog is called Rex.", "A: Nice.", "Forget about the weather, it will rain anyway."),
    ("I want to cancel my flight.", "A: It cannot be refunded.", "Can I have a voucher instead?"),
    ("I like the blue one.", "A: It is sold out.", "Sorry, I don't have my order number."),
    ("What is the capital of France?", "A: Paris.", "Thank you, that helps."),
    ("We should meet on Friday.", "A: Fine.", "I haven't changed my mind about Friday."),
    ("Remind me of the concert.", "A: I will.", "The concert no longer sells tickets at the door."),
    ("I want the large pizza.", "A: With olives?", "No, sorry, I hate olives."),
)

HELD_OUT = (
    # withdrawn or replaced
    (
        "[[We want a room with a sea view.]] Breakfast should be included.",
        "A: Noted.",
        "Scratch the sea view, it is too expensive.",
    ),
    (
        "[[I take my coffee with milk.]]",
        "A: Noted.",
        "Where is the nearest bakery?",
        "A: Around the corner.",
        "I don't take milk in my coffee anymore.",
    ),
    ("[[Please schedule the call for 3 pm.]]", "A: Done.", "Oops, I meant 4 pm."),
    (
        "[[I always fly with Lufthansa.]] My home airport is Munich.",
        "A: Noted.",
        "Please drop my airline preference; I mean Lufthansa.",
    ),
    ("[[The meeting should be in room 204.]]", "A: Booked.", "Sorry, room 240, not 204."),
    ("[[My favourite colour is red.]]", "A: Noted.", "My favourite colour isn't red any more."),
    ("I am going to Oslo. [[I want to rent a car there.]]", "A: From which day?", "I won't need the car after all."),
    ("[[Write the summary in French.]]", "A: D'accord.", "Change of plan: write the summary in Spanish instead."),
    (
        "[[I'd rather sit at the front.]]",
        "A: Noted.",
        "And my bag is heavy.",
        "A: Fine.",
        "You can forget my wish to sit at the front.",
    ),
    (
        "[[My email is old@example.org.]]",
        "A: Saved.",
        "Please send me the bill.",
        "A: Sent.",
        "Correction: my email is new@example.org.",
    ),
    (
        "[[Our limit is 40 euros per person.]] We like sushi.",
        "A: Noted.",
        "Forget about the limit, we are celebrating.",
    ),
    (
        "[[Keep the answers short.]]",
        "A: Okay.",
        "Explain gravity.",
        "A: Mass attracts mass.",
        "Disregard my request to keep the answers short.",
    ),
    ("[[I need the report by Wednesday.]]", "A: Sure.", "Actually Friday is fine."),
    ("[[Let's cook the lasagne tonight.]]", "A: Good.", "Strike that, let's order pizza."),
    ("[[Book a double room.]] We arrive at noon.", "A: Okay.", "I misspoke, it should be a twin room, not a double."),
    (
        "[[I'm on a low-carb diet]], and my wife eats everything.",
        "A: Noted.",
        "I've stopped the diet, so I am no longer low-carb.",
    ),
    (
        "[[My doctor is Dr. Weber.]] I have an appointment in March.",
        "A: Noted.",
        "I have changed my mind about Dr. Weber, please find someone else.",
    ),
    ("[[Put me on the newsletter list.]]", "A: Done.", "Take back what I said about the newsletter."),
    # nothing to take back
    ("I need a quiet room.", "A: Noted.", "You haven't forgotten my quiet room, have you?"),
    ("I live at 5 Elm Street.", "A: Noted.", "Actually, could you tell me the time?"),
    ("Play some jazz.", "A: Playing.", "Never mind me, I'm just humming along."),
    ("I'd like the salmon.", "A: It comes with rice.", "Sorry for the late answer, rice is fine."),
    ("My appointment is on Monday.", "A: Noted.", "Don't ignore what I said about Monday!"),
    ("I am learning Spanish.", "A: Great.", 'How do you say "I changed my mind" in Spanish?'),
    ("I use Python 3.12.", "A: Noted.", "The function no longer works in Python 3.12."),
    ("I have two cats.", "A: Nice.", "Actually, they are both asleep now."),
    ("We want the blue sofa.", "A: Good choice.", "If I changed my mind about the sofa, could I return it?"),
    ("I want to fly on 3 June.", "A: There are two flights.", "Let's go with the one at 9 am."),
    ("My password hint is the river.", "A: Okay.", "I forgot my password."),
    ("I prefer the morning train.", "A: There are two.", "Not the first one, the second one please."),
    ("My budget is 500 euros.", "A: There is nothing.", "Forget it then. Goodbye."),
    ("Delete my account.", "A: Are you sure?", "Yes, delete my account, please."),
    ("I want to book a flight to Paris.", "A: For when?", "I'd rather pay by card."),
    ("Tell me about scratch cards.", "A: They are games.", "Do people scratch that with a coin?"),
    ("I am a vegetarian.", "A: Noted.", "My brother is no longer a vegetarian."),
    ("Wait for me at gate 4.", "A: I will.", "Wait, which terminal is it?"),
)


def parsed(row):
    messages, withdrawn = [], []
    for number, turn in enumerate(row):
        role, text = ("assistant", turn[3:]) if turn.startswith("A: ") else ("user", turn)
        start, end = text.find("[["), text.find("]]") - 2
        text = text.replace("[[", "").replace("]]", "")
        if start >= 0:
            whole = (start, end) == (0, len(text))
            withdrawn.append(SpanRef(number) if whole else SpanRef(number, start=start, end=end))
        messages.append(Message(role, text))
    return messages, withdrawn


def dialogue(*turns):
    return parsed(turns)[0]


def proposed(messages, **parameters):
    return UserRevoked(**parameters).propose(PolicyContext(thread_id="t", messages=messages))


def texts(messages, **parameters):
    return [retracted_text(r, messages) for r in proposed(messages, **parameters)]


@pytest.mark.parametrize("row", DEVELOPED, ids=lambda row: row[-1])
def test_dialogues_that_the_rules_were_made_on(row):
    messages, withdrawn = parsed(row)
    assert [r.span for r in proposed(messages)] == withdrawn


def test_dialogues_that_the_rules_never_saw():
    right = wrong = 0
    for row in HELD_OUT:
        messages, withdrawn = parsed(row)
        spans = [r.span for r in proposed(messages)]
        right += len(set(spans) & set(withdrawn))
        wrong += len(set(spans) - set(withdrawn))
    stated = sum("[[" in turn for row in HELD_OUT for turn in row)
    print(f"held-out dialogues: {right} of {stated} withdrawn statements found exactly, {wrong} other proposals")
    assert stated == 18 and right >= 16 and wrong <= 1


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("length", [256, 1024])
def test_withdrawals_of_the_synthetic_corpus(split, length):
    right = spans = withdrawn = 0
    for sample in samples("preferences", 20, seed=5000, split=split, length=length):
        stated = {s.span_id.removeprefix("stated-"): s.ref for s in sample.spans if s.span_id.startswith("stated-")}
        later = [s.span_id.removeprefix("later-") for s in sample.spans if s.span_id.startswith("later-")]
        found = {r.span for r in proposed(sample.messages)}
        right += len(found & {stated[number] for number in later})
        spans, withdrawn = spans + len(found), withdrawn + len(later)
    assert withdrawn >= 20
    assert right >= 0.95 * withdrawn and right >= 0.95 * spans


@pytest.mark.parametrize("family", sorted(set(training_families()) - {"preferences"}))
def test_families_without_withdrawals_give_none(family):
    assert not [r for sample in samples(family, 10, split="test", length=1024) for r in proposed(sample.messages)]


@pytest.mark.parametrize("name", ["tau_bench", "swe_agent", "reflexion_hotpotqa"])
def test_real_threads_give_no_proposals(name):
    if not (DATA / name).exists():
        pytest.skip(f"the public data set {name} is not beside this checkout")
    traces = [trace for trace in read_traces(DATA / name) if isinstance(trace, Trace)]
    assert traces and not [r for trace in traces for r in proposed(trace.messages)]


def test_only_the_newest_statement_on_a_topic_goes():
    messages = dialogue(
        "My hotel is the Ritz.", "A: Noted.", "My hotel is the Astoria.", "A: Fine.", "Forget my hotel."
    )
    assert texts(messages) == ["My hotel is the Astoria."]


def test_a_chain_of_replacements_takes_every_older_value():
    messages = dialogue(
        "My hotel is the Ritz.", "Actually, my hotel is the Plaza.", "No wait, my hotel is the Astoria."
    )
    assert [r.span for r in proposed(messages)] == [SpanRef(0), SpanRef(1)]


def test_the_withdrawing_sentence_stays_and_earlier_ones_of_its_message_may_go():
    messages = dialogue("I'd like a window seat. Actually, make it aisle.")
    assert texts(messages) == ["I'd like a window seat."]


def test_what_only_takes_back_cannot_be_taken_back():
    assert texts(dialogue("I want the aisle.", "A: Noted.", "Forget the aisle.", "A: Done.", "Scratch that.")) == [
        "I want the aisle."
    ]


def test_a_mention_does_not_hide_the_statement():
    messages = dialogue(
        "My dentist is Dr. Kel.", "A: Noted.", "Keep my dentist in mind.", "Strike my dentist preference."
    )
    assert texts(messages) == ["My dentist is Dr. Kel."]


def test_other_people_and_tools_withdraw_nothing():
    said = [Message("user", "My hotel is the Ritz.")]
    for role in ("assistant", "tool", "system"):
        assert not proposed([*said, Message(role, "Forget my hotel.")])
    assert not proposed([*said, Message("user", "> Forget my hotel.")])
    assert not proposed([*said, Message("user", "My sister wrote “forget my hotel”.")])


def test_pasted_text_neither_withdraws_nor_goes():
    long = "my hotel is far away and " * 20
    assert not proposed(dialogue(f"My hotel is the Ritz and {long}.", "A: Noted.", "Forget my hotel."))
    assert not proposed(dialogue("My hotel is the Ritz.", "A: Noted.", f"Forget my hotel, {long}."))


def test_the_reason_names_the_place_and_not_the_text():
    messages = dialogue("My hotel is the Ritz.", "A: Noted.", "Forget my hotel.")
    [retraction] = proposed(messages, guarantee="exact")
    assert retraction.reason == "the user took it back or replaced it in message 2"
    assert retraction.guarantee is Guarantee.EXACT
    assert retraction.confidence == 1.0


def test_min_score_keeps_only_sure_ones():
    messages = dialogue("Play some jazz.", "A: Playing.", "Make it louder.")
    assert [r.confidence for r in proposed(messages)] == [0.5]
    assert not proposed(messages, min_score=0.6)


def test_cues_can_be_added():
    messages = dialogue("My hotel is the Ritz.", "A: Noted.", "Let's nix my hotel.", "I like jazz.", "Erm, rewind.")
    assert not proposed(messages)
    assert texts(messages, cues=[r"\bnix (?P<topic>.+)"]) == ["My hotel is the Ritz."]
    assert texts(messages, cues=[r"\brewind\b"]) == ["I like jazz."]


def test_restatements_of_the_assistant_go_on_request():
    messages = dialogue(
        "I want a window seat.", "A: Sure. A window seat it is, as you want.", "Great.", "A: Anything else?",
        "Scratch the window seat.", "A: The window seat is gone.",
    )  # fmt: skip
    assert texts(messages) == ["I want a window seat."]
    assert texts(messages, include_restated=True) == ["I want a window seat.", "A window seat it is, as you want."]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"min_score": 2}, "min_score from 0 to 1, got 2"),
        ({"cues": "forget"}, "a list of regular expressions"),
        ({"cues": ["(open"]}, "regular expressions as cues"),
    ],
)
def test_parameters_are_checked(parameters, message):
    with pytest.raises(PolicyError, match=message):
        POLICIES.create("user_revoked", **parameters)


@pytest.mark.parametrize(
    "text",
    ["my " * 40_000 + "actually", "." * 100_000 + "a actually", "a." * 50_000 + " actually", "\"" * 100_000 + "forget",
     "1," * 50_000 + " actually", "Actually, forget my seat, not that I do not care. " * 500],
    ids=["words", "dots", "dotted", "quotes", "digits", "cues"],
)  # fmt: skip
def test_long_messages_take_no_time_that_grows_with_the_square(text):
    begin = time.perf_counter()
    proposed([Message("user", text)])
    assert time.perf_counter() - begin < 2  # seconds; the square of these lengths takes minutes


def test_two_thousand_messages_with_statements_take_milliseconds():
    messages = [Message("user", f"My hotel number {i} is Kel, and I need a room.") for i in range(1000)]
    messages = [m for user in messages for m in (user, Message("assistant", "Noted."))]
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        proposed(messages)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < (0.05 if sys.gettrace() is None else 0.5)


class TestUserRevoked(PolicyConformance):
    texts = (
        "I'd like a window seat, and my meal is vegan.", "My hotel is the Ritz.", "Forget my hotel.", "Scratch that.",
        "Actually, make it aisle.", "I meant 12 May, not 21.", "Book it for 21 May.", "",
    )  # fmt: skip

    @pytest.fixture(params=[False, True], ids=["user", "restated"])
    def policy(self, request):
        return UserRevoked(include_restated=request.param)

    @pytest.fixture
    def thread(self):
        return dialogue("My hotel is the Ritz.", "A: My hotel Ritz is noted.", "Forget my hotel.")
