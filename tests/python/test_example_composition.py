"""`examples/composition.py`: waiters, hits and what the cache has spend neither rate nor budget."""

import asyncio
import contextlib
import subprocess
import sys
import threading

import pytest
from example_runs import EXAMPLES, load_example
from loops import PATIENCE, wait_for_waiters, wait_until
from pyrate_limiter import Duration

example = load_example("composition")

RATE, TOKENS = 5, 1_000
COST = 40


class Model:
    """Answers when the test lets it, in threads and tasks; counts its calls."""

    def __init__(self, *, held=False, error=None):
        self.calls = []
        self.released = threading.Event()
        self._error = error
        if not held:
            self.released.set()

    def __call__(self, prompt):
        self.calls.append(prompt)
        assert self.released.wait(PATIENCE)
        if self._error is not None:
            raise self._error
        return example.Answer(f"an answer to {prompt}", tokens=COST)

    async def in_task(self, prompt):
        return await asyncio.to_thread(self, prompt)


class HeldBudget(example.Budget):
    """A budget that keeps whoever asks for it waiting: a leader at its gate, while others come."""

    def __init__(self, tokens):
        super().__init__(tokens)
        self.asked, self.released = threading.Event(), threading.Event()

    @contextlib.contextmanager
    def reserved(self, tokens):
        self.asked.set()
        assert self.released.wait(PATIENCE)
        with super().reserved(tokens) as settle:
            yield settle


def tenant(name="acme", *, tokens=TOKENS, rate=RATE, held=False):
    budget = HeldBudget(tokens) if held else example.Budget(tokens)
    limit = example.RateLimit(max(rate, 1), Duration.WEEK)
    assert rate > 0 or limit.admits()  # it has had its only call
    return example.Tenant(name, budget, limit)


def rate_left(tenant):
    """Return how many calls the limiter lets through, and use them up."""
    left = 0
    while tenant.rate.admits():
        left += 1
    return left


class Caller(threading.Thread):
    """A caller in a thread of its own, or in a task on a loop of its own."""

    def __init__(self, ask, *arguments):
        super().__init__()
        self._ask, self._arguments = ask, arguments
        self.got = None
        self.start()

    def run(self):
        try:
            self.got = self._ask(*self._arguments)
        except Exception as error:
            self.got = error

    def outcome(self):
        self.join(PATIENCE)
        assert not self.is_alive()
        return self.got


def ask_in_thread(assistant, tenant, prompt, model):
    return assistant.ask(tenant, prompt, model)


def ask_in_task(assistant, tenant, prompt, model):
    return asyncio.run(assistant.ask_async(tenant, prompt, model.in_task))


@pytest.fixture(params=[ask_in_thread, ask_in_task])
def ask(request):
    return request.param


@pytest.fixture
def assistant():
    return example.Assistant()


def wait_for(assistant, count, prompt="alpha"):
    wait_for_waiters(assistant.coalescer, assistant.key_of(prompt), count)


def test_of_50_callers_one_passes_the_gate_and_pays(assistant, ask):
    acme, model = tenant(), Model(held=True)
    callers = [Caller(ask, assistant, acme, "alpha", model) for _ in range(50)]
    wait_for(assistant, 49)
    assert acme.budget.left == TOKENS - example.MOST_TOKENS  # reserved, once
    model.released.set()
    assert {caller.outcome() for caller in callers} == {"an answer to alpha"}
    assert model.calls == ["alpha"]
    assert acme.budget.left == TOKENS - COST
    assert rate_left(acme) == RATE - 1


def test_waiters_of_another_tenant_do_not_pay(assistant, ask):
    leader, others, model = (
        tenant("leader"),
        [tenant(f"waiter {n}", tokens=0, rate=0) for n in range(20)],
        Model(held=True),
    )
    first = Caller(ask, assistant, leader, "alpha", model)
    wait_until(lambda: model.calls)
    callers = [first, *(Caller(ask, assistant, other, "alpha", model) for other in others)]
    wait_for(assistant, 20)
    model.released.set()
    assert {caller.outcome() for caller in callers} == {"an answer to alpha"}
    assert leader.budget.left == TOKENS - COST
    assert [other.budget.left for other in others] == [0] * 20


def test_threads_and_tasks_share_one_payment(assistant):
    acme, model = tenant(), Model(held=True)
    callers = [Caller(face, assistant, acme, "alpha", model) for face in (ask_in_thread, ask_in_task) * 10]
    wait_for(assistant, 19)
    model.released.set()
    assert {caller.outcome() for caller in callers} == {"an answer to alpha"}
    assert (model.calls, acme.budget.left, rate_left(acme)) == (["alpha"], TOKENS - COST, RATE - 1)


def test_hits_spend_nothing(assistant, ask):
    acme, poor, model = tenant(), tenant("poor", tokens=0, rate=0), Model()
    assert {ask(assistant, each, "alpha", model) for each in (acme, *[acme, poor] * 10)} == {"an answer to alpha"}
    assert assistant.coalescer.stats().hits == 20
    assert (model.calls, acme.budget.left, poor.budget.left) == (["alpha"], TOKENS - COST, 0)
    assert rate_left(acme) == RATE - 1


def test_what_the_cache_has_spends_nothing(assistant, ask):
    acme, poor, model = tenant(), tenant("poor", tokens=0, rate=0), Model()
    ask(assistant, acme, "alpha", model)
    for number in range(1, 6):
        assistant.coalescer.clear()  # its TTL is over, the cache's is not
        assert ask(assistant, poor, "alpha", model) == "an answer to alpha"
        assert assistant.coalescer.stats().store_hits == number
    assert (model.calls, acme.budget.left, poor.budget.left) == (["alpha"], TOKENS - COST, 0)
    assert rate_left(acme) == RATE - 1


@pytest.mark.parametrize(
    ("short_of", "error"),
    [({"tokens": 10}, example.BudgetExceededError), ({"rate": 0}, example.RateLimitedError)],
    ids=["budget", "rate"],
)
@pytest.mark.parametrize("length", [1, 3])
def test_a_leader_that_is_out_of_its_own_fails_alone_and_the_next_one_pays(assistant, ask, short_of, error, length):
    model = Model()
    poor = [tenant(f"poor {number}", held=True, **short_of) for number in range(length)]
    before = [each.budget.left for each in poor]
    rich = [tenant(f"rich {number}") for number in range(20)]
    callers = []
    for number, each in enumerate([*poor, *rich]):
        callers.append(Caller(ask, assistant, each, "alpha", model))
        if number == 0:
            assert each.budget.asked.wait(PATIENCE)  # it leads
        else:
            wait_for(assistant, number)  # in this order
    for each in poor:
        each.budget.released.set()
    outcomes = [caller.outcome() for caller in callers]
    assert [type(outcome) for outcome in outcomes[:length]] == [error] * length
    assert outcomes[length:] == ["an answer to alpha"] * 20
    assert model.calls == ["alpha"]
    assert [each.budget.left for each in poor] == before
    assert [each.budget.left for each in rich] == [TOKENS - COST] + [TOKENS] * 19
    assert [rate_left(each) for each in rich] == [RATE - 1] + [RATE] * 19


def test_whoever_is_short_of_budget_keeps_its_rate(assistant, ask):
    poor = tenant("poor", tokens=10)
    with pytest.raises(example.BudgetExceededError, match="10 tokens left"):
        ask(assistant, poor, "alpha", Model())
    assert rate_left(poor) == RATE


def test_when_all_are_short_each_gets_its_own_error_and_nothing_is_kept(assistant, ask):
    model, first = Model(), tenant("poor", tokens=10, held=True)
    callers = [Caller(ask, assistant, first, "alpha", model)]
    assert first.budget.asked.wait(PATIENCE)
    callers += [Caller(ask, assistant, tenant(f"poor {n}", tokens=n), "alpha", model) for n in range(10)]
    wait_for(assistant, 10)
    first.budget.released.set()
    said = [str(caller.outcome()).split()[0] for caller in callers]
    assert said[0] == "10"
    assert said[1:] == [str(number) for number in range(10)]
    assert not model.calls
    assert ask(assistant, tenant(), "alpha", model) == "an answer to alpha"


def test_an_error_of_the_model_is_for_everybody_and_costs_no_budget(assistant, ask):
    acme, model = tenant(), Model(held=True, error=RuntimeError("overloaded"))
    callers = [Caller(ask, assistant, acme, "alpha", model) for _ in range(20)]
    wait_for(assistant, 19)
    model.released.set()
    assert [str(caller.outcome()) for caller in callers] == ["overloaded"] * 20
    assert (model.calls, acme.budget.left, rate_left(acme)) == (["alpha"], TOKENS, RATE - 1)


def test_leaders_of_many_keys_spend_exactly_what_they_have(assistant, ask):
    acme, model = tenant(), Model(held=True)
    callers = [Caller(ask, assistant, acme, f"prompt {number}", model) for number in range(20)]
    wait_until(lambda: len(model.calls) == RATE and sum(not caller.is_alive() for caller in callers) == 20 - RATE)
    assert acme.budget.left == TOKENS - RATE * example.MOST_TOKENS
    model.released.set()
    outcomes = [caller.outcome() for caller in callers]
    refused = [outcome for outcome in outcomes if isinstance(outcome, example.RateLimitedError)]
    assert len(refused) == 20 - RATE
    assert acme.budget.left == TOKENS - RATE * COST


def test_a_rate_limit_that_many_ask_at_once_admits_its_rate_and_refuses_nobody_before(crew, monkeypatch):
    limit = example.RateLimit(20, Duration.WEEK)
    bucket = limit._limiter.bucket_factory.bucket
    put = bucket.put

    def put_slowly(item):
        threading.Event().wait(0.001)  # others come meanwhile
        return put(item)

    monkeypatch.setattr(bucket, "put", put_slowly)
    assert sum(crew.start(8, lambda _: sum(limit.admits() for _ in range(5))).join()) == 20


def test_calls_under_way_have_their_budget_reserved(assistant, ask):
    acme, model = tenant(tokens=250), Model(held=True)
    callers = [Caller(ask, assistant, acme, f"prompt {number}", model) for number in range(3)]
    wait_until(lambda: len(model.calls) == 2 and any(not caller.is_alive() for caller in callers))
    model.released.set()
    outcomes = [caller.outcome() for caller in callers]
    assert sum(isinstance(outcome, example.BudgetExceededError) for outcome in outcomes) == 1, outcomes
    assert acme.budget.left == 250 - 2 * COST
    assert ask(assistant, acme, "one more", model) == "an answer to one more"


def test_it_runs_as_a_program():
    program = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / "composition.py")],
        capture_output=True,
        encoding="utf-8",
        check=True,
        timeout=PATIENCE,
    )
    assert program.stdout.splitlines()[0] == "50 callers, 1 call, 960 of 1000 tokens left"
    assert program.stderr == ""
