//! The coalescer of threads: hit, wait and lead without entering a Python frame of this package.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use super::answer::{Answer, Request, Role, find, find_value};
use super::coalescer::{Coalescer, Options};
use super::errors::{cancelled_error, timeout_error};
use super::family::{Python3, Shared, check_interrupt, running_loop};
use super::hooks::Hooks;
use super::inside::{Call, Inside, Led};
use super::many;
use super::options::{self, ErrorTtl, MAX_BUFFERED, Patience, Ttl};
use super::streams::Asked as StreamAsked;
use super::thread_stream::ThreadStream;
use super::{ffi, key};
use crate::circle::{BlockedLoop, Nested, Target};
use crate::flight::Flight;
use crate::fork;
use crate::lead::{Lead, Place};
use crate::map::{Found, Map};
use crate::seat::Standing;
use crate::sync::Arc;
use crate::waiter::{NO_LOOP, Wakeup};

/// The coalescer of threads.
#[pyclass(frozen, subclass, extends = Coalescer, module = "llm_batch_coalesce._core")]
pub(super) struct ThreadCoalescer;

#[pymethods]
impl ThreadCoalescer {
    #[new]
    #[pyo3(signature = (*_arguments, **_options))]
    #[pyo3(text_signature = "(ttl_seconds=5.0, *, error_ttl_seconds=None, private_errors=(), \
        max_flight_seconds=None, max_retained=None, name=None, store=None)")]
    fn new(
        _arguments: &Bound<'_, PyTuple>,
        _options: Option<&Bound<'_, PyDict>>,
    ) -> PyClassInitializer<Self> {
        PyClassInitializer::from(Coalescer::default()).add_subclass(Self)
    }

    #[pyo3(signature = (ttl_seconds = Ttl::DEFAULT, *, error_ttl_seconds = ErrorTtl::Same, private_errors = None,
        max_flight_seconds = None, max_retained = None, name = None, store = None))]
    #[expect(clippy::too_many_arguments, reason = "they are options, given by name")]
    fn __init__(
        slf: &Bound<'_, Self>,
        #[pyo3(from_py_with = options::ttl_seconds)] ttl_seconds: Ttl,
        #[pyo3(from_py_with = options::error_ttl_seconds)] error_ttl_seconds: ErrorTtl,
        #[pyo3(from_py_with = options::private_errors)] private_errors: Option<Py<PyTuple>>,
        #[pyo3(from_py_with = options::max_flight_seconds)] max_flight_seconds: Option<Ttl>,
        #[pyo3(from_py_with = options::max_retained)] max_retained: Option<u64>,
        #[pyo3(from_py_with = options::name)] name: Option<Arc<str>>,
        store: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        slf.as_super().get().make(Options {
            ttl: ttl_seconds,
            error_ttl: error_ttl_seconds,
            private_errors,
            max_flight: max_flight_seconds,
            max_retained,
            finishes: false,
            name,
            store: options::store(store, false)?,
        })
    }

    /// Return the outcome of `key`: the one retained, that of the call under way, or that of calling `fn()`.
    ///
    /// Args:
    ///     key: Any hashable object; keys that are equal as in a dict are one.
    ///     fn: Called without arguments, in this thread, if this caller leads. It may return
    ///         `Retain(value, ttl_seconds)` to set the TTL by its result.
    ///     timeout: How long this caller waits for another's call, in seconds; 0 does not wait. It never bounds the
    ///         call: a caller that leads has no timeout.
    ///     ttl_seconds: The TTL in seconds of the outcome that this caller leads, instead of the coalescer's.
    ///
    /// Returns:
    ///     What the call returned, the same object for every caller.
    ///
    /// Raises:
    ///     Exception: What the call raised: the original for the leader, a copy for everybody else.
    ///     TimeoutError: If `timeout` passed. Only for this caller.
    ///     concurrent.futures.CancelledError: If the key was cancelled.
    ///     RecursiveCallError: If the call that computes this key asks for it.
    ///     DeadlockError: If that call waits, in the end, for this caller.
    ///     CallResultError: If `fn()` returns a coroutine. It is a TypeError.
    ///     TypeError: If the key is unhashable, `fn` is not callable or a number is none.
    ///     ValueError: If a number of seconds is negative or NaN.
    #[pyo3(signature = (key, r#fn, *, timeout = None, ttl_seconds = None))]
    fn get_or_call<'py>(
        slf: &Bound<'py, Self>,
        key: &Bound<'py, PyAny>,
        r#fn: &Bound<'py, PyAny>,
        timeout: Option<&Bound<'py, PyAny>>,
        ttl_seconds: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        if timeout.is_some() || ttl_seconds.is_some() {
            return ask(slf.as_super(), key, r#fn, timeout, ttl_seconds, false);
        }
        // All that a hit needs, and nothing else.
        let hash = key::hash(key)?;
        let map = slf.as_super().get().map();
        match find_value(map, hash, key)? {
            Found::Hit(shared) => shared.into_result(),
            Found::Pending(flight) => missed(slf.as_super(), map, Found::Pending(flight), hash, key, r#fn),
            Found::Nothing => missed(slf.as_super(), map, Found::Nothing, hash, key, r#fn),
        }
    }

    /// Return the same as `get_or_call`, with this caller's role and what is known of the flight.
    ///
    /// Args:
    ///     key: As in `get_or_call`.
    ///     fn: As in `get_or_call`.
    ///     timeout: As in `get_or_call`, in seconds.
    ///     ttl_seconds: As in `get_or_call`, in seconds.
    ///
    /// Returns:
    ///     The value, whether this caller led, waited or was served what is retained, how many waited, and how long
    ///     the call took in seconds.
    ///
    /// Raises:
    ///     Exception: As in `get_or_call`.
    #[pyo3(signature = (key, r#fn, *, timeout = None, ttl_seconds = None))]
    fn outcome<'py>(
        slf: &Bound<'py, Self>,
        key: &Bound<'py, PyAny>,
        r#fn: &Bound<'py, PyAny>,
        timeout: Option<&Bound<'py, PyAny>>,
        ttl_seconds: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        ask(slf.as_super(), key, r#fn, timeout, ttl_seconds, true)
    }

    /// Return the outcomes of many keys; those that are neither retained nor in flight are led in one call.
    ///
    /// What this caller leads has ended before it waits for others, so callers whose keys overlap never wait for each
    /// other in a circle. Where a call of others ends in a way that is not shared, `fn` is called with that key alone.
    ///
    /// Args:
    ///     keys: Any hashable objects; duplicates do no harm.
    ///     fn: Called in this thread with the list of the keys that this caller leads, in their order; returns a
    ///         mapping, or a sequence in the order of that list. Values may be `Retain(value, ttl_seconds)`.
    ///     timeout: How long this caller waits for others' calls in all, in seconds; 0 does not wait.
    ///     ttl_seconds: The TTL in seconds of the outcomes that this caller leads, instead of the coalescer's.
    ///
    /// Returns:
    ///     The value of each key, in the order of `keys`.
    ///
    /// Raises:
    ///     MissingKeysError: If a call gave no value for some of these keys. Its `values` has those of the others. It
    ///         is not retained.
    ///     Exception: What a call raised; the first one in the order of `keys` that is no `MissingKeysError`.
    ///     TimeoutError: If `timeout` passed. Only for this caller.
    ///     concurrent.futures.CancelledError: If one of the keys was cancelled.
    ///     RecursiveCallError: If the call that computes one of the keys asks for it.
    ///     DeadlockError: If a call waits, in the end, for this caller.
    ///     CallResultError: If `fn` returns something else. It is a TypeError.
    ///     TypeError: If a key is unhashable, `fn` is not callable or a number is none.
    ///     ValueError: If a number of seconds is negative or NaN.
    #[pyo3(signature = (keys, r#fn, *, timeout = None, ttl_seconds = None))]
    fn get_or_call_many<'py>(
        slf: &Bound<'py, Self>,
        keys: &Bound<'py, PyAny>,
        r#fn: &Bound<'py, PyAny>,
        timeout: Option<&Bound<'py, PyAny>>,
        ttl_seconds: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        many::get_or_call_many(slf.as_super(), keys, r#fn, timeout, ttl_seconds)
    }

    /// Iterate over the items of one upstream that all readers of the key share.
    ///
    /// Every reader gets every item in order from the first, also one that joins late or while the stream is retained;
    /// it joins when it asks for its first item. Whichever reader is at the front pulls the next item for all, and the
    /// others wait; no slow reader holds up another. When the last reader has left (by `close()`, by leaving its `with`
    /// block, or by dropping the iterator), upstream is closed. Streams have keys of their own beside those of
    /// `get_or_call`.
    ///
    /// Args:
    ///     key: Any hashable object.
    ///     fn: Called without arguments by the one reader that leads; returns an iterator, a generator or another
    ///         iterable.
    ///     ttl_seconds: How long the whole stream is retained after its end, in seconds, instead of the coalescer's
    ///         TTL.
    ///     max_buffered: How many items the log holds at most; None sets no limit. Beyond it nobody joins any more
    ///         (later readers lead a stream of their own), what all readers have passed is dropped, and a reader that
    ///         is farther behind gets `StreamLagError`. The leader's number counts.
    ///
    /// Returns:
    ///     An iterator over the items, the same objects for every reader. It is for one thread at a time, and has the
    ///     `close()` of a generator.
    ///
    /// Raises:
    ///     Exception: What upstream raised, after the items that came before: the original for the reader that pulled,
    ///         a copy for everybody else.
    ///     StreamLagError: If this reader is too far behind. Only for this reader.
    ///     SharedCallError: If the stream ended, after its first item, in a way that is not shared: with a private
    ///         error, or in a thread that was interrupted. Readers without an item start over.
    ///     RecursiveCallError: If the call that yields this stream reads it.
    ///     DeadlockError: If that call waits, in the end, for this reader.
    ///     CallResultError: If `fn()` returns no iterable. It is a TypeError.
    ///     TypeError: If the key is unhashable, `fn` is not callable or a number is none.
    ///     ValueError: If a number of seconds is negative or NaN, or `max_buffered` below 1; if two threads are in one
    ///         iterator at once.
    #[pyo3(signature = (key, r#fn, *, ttl_seconds = None, max_buffered = MAX_BUFFERED))]
    #[pyo3(text_signature = "($self, key, fn, *, ttl_seconds=None, max_buffered=65536)")]
    fn stream(
        slf: &Bound<'_, Self>,
        key: &Bound<'_, PyAny>,
        r#fn: &Bound<'_, PyAny>,
        #[pyo3(from_py_with = options::own_ttl_seconds)] ttl_seconds: Option<Ttl>,
        #[pyo3(from_py_with = options::max_buffered)] max_buffered: usize,
    ) -> PyResult<ThreadStream> {
        key::hash(key)?;
        options::callable("fn", r#fn)?;
        let asked = StreamAsked { ttl: ttl_seconds, max_buffered, pumped_here: false };
        Ok(ThreadStream::new(slf.as_super(), key, r#fn, asked))
    }
}

#[cold]
fn ask<'py>(
    coalescer: &Bound<'py, Coalescer>,
    key: &Bound<'py, PyAny>,
    r#fn: &Bound<'py, PyAny>,
    timeout: Option<&Bound<'py, PyAny>>,
    ttl_seconds: Option<&Bound<'py, PyAny>>,
    detailed: bool,
) -> PyResult<Bound<'py, PyAny>> {
    let request = Request::new(timeout, ttl_seconds, detailed)?;
    let hash = key::hash(key)?;
    let map = coalescer.get().map();
    let found = find(map, hash, key)?;
    let asked = Asked { coalescer, hash, key, r#fn, timeout, request };
    asked.follow(map, found)?.into_result(key.py(), detailed)
}

#[cold]
fn missed<'py>(
    coalescer: &Bound<'py, Coalescer>,
    map: &Arc<Map<Python3>>,
    found: Found<Python3, Answer<'py>>,
    hash: u64,
    key: &Bound<'py, PyAny>,
    r#fn: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    let asked = Asked { coalescer, hash, key, r#fn, timeout: None, request: Request::PLAIN };
    asked.follow(map, found)?.into_result(key.py(), false)
}

/// What is noted while a thread waits.
struct Blocking {
    _nested: Option<Nested>,
    _loop: Option<BlockedLoop>,
}

impl Blocking {
    const NOT: Self = Self { _nested: None, _loop: None };
}

/// A request of a thread.
pub(super) struct Asked<'a, 'py> {
    pub(super) coalescer: &'a Bound<'py, Coalescer>,
    pub(super) hash: u64,
    pub(super) key: &'a Bound<'py, PyAny>,
    pub(super) r#fn: &'a Bound<'py, PyAny>,
    pub(super) timeout: Option<&'a Bound<'py, PyAny>>,
    pub(super) request: Request,
}

impl<'a, 'py> Asked<'a, 'py> {
    fn follow(
        &self,
        map: &'a Arc<Map<Python3>>,
        found: Found<Python3, Answer<'py>>,
    ) -> PyResult<Answer<'py>> {
        if !matches!(found, Found::Hit(_)) {
            options::callable("fn", self.r#fn)?;
        }
        self.follow_until(map, found, &mut None)
    }

    /// Gets the outcome of a flight that this caller has joined, or, if that gives none, whatever there is now.
    pub(super) fn come_for(
        &self,
        place: Place<Python3>,
        until: &mut Option<Instant>,
    ) -> PyResult<Answer<'py>> {
        place.begin_waiting();
        let blocking = match place.standing() {
            Standing::Waiting => self.begin_blocking(place.map(), place.flight(), until),
            _ => Ok(Blocking::NOT),
        };
        // A wait that may not begin is no request.
        let blocking = blocking.inspect_err(|_| place.ask_again())?;
        if let Some(answer) = self.sit(place, blocking, *until)? {
            return Ok(answer);
        }
        let map = self.coalescer.get().map();
        self.follow_until(map, find(map, self.hash, self.key)?, until)
    }

    fn follow_until(
        &self,
        mut map: &'a Arc<Map<Python3>>,
        mut found: Found<Python3, Answer<'py>>,
        until: &mut Option<Instant>,
    ) -> PyResult<Answer<'py>> {
        let this = self.coalescer.get();
        loop {
            match found {
                Found::Hit(answer) => return Ok(answer),
                Found::Nothing => {
                    if let Some(lead) = this.claim(map, self.hash, self.key, NO_LOOP)? {
                        return self.lead(lead);
                    }
                }
                Found::Pending(flight) => {
                    if let Some(answer) = self.join(map, flight, until)? {
                        return Ok(answer);
                    }
                }
            }
            map = this.map();
            found = find(map, self.hash, self.key)?;
        }
    }

    /// Waits for a flight. `None` if it has ended without anything for this caller, which then asks again.
    fn join(
        &self,
        map: &Arc<Map<Python3>>,
        flight: Arc<Flight<Python3>>,
        until: &mut Option<Instant>,
    ) -> PyResult<Option<Answer<'py>>> {
        let blocking = self.begin_blocking(map, &flight, until)?;
        let Some(place) = map.join(&flight, NO_LOOP, Wakeup::this_thread()) else { return Ok(None) };
        drop(flight);
        self.sit(place, blocking, *until)
    }

    /// Notes that this thread will wait, unless that would never end or may not begin.
    fn begin_blocking(
        &self,
        map: &Map<Python3>,
        flight: &Arc<Flight<Python3>>,
        until: &mut Option<Instant>,
    ) -> PyResult<Blocking> {
        let (py, this) = (self.key.py(), self.coalescer.get());
        let inside = Inside::of_thread(py)?;
        if inside.includes(flight) {
            return Err(this.recursive_error(self.key)?);
        }
        match self.request.patience {
            Patience::Endless => {}
            Patience::None => {
                map.count_timeout(self.hash);
                return Err(self.timeout_error(map)?);
            }
            // What is too far away for the clock is no limit.
            Patience::Limited(limit) => *until = until.or_else(|| Instant::now().checked_add(limit)),
        }
        let event_loop = running_loop(py)?;
        let blocked = (!event_loop.is_none()).then(|| event_loop.as_ptr().addr());
        if blocked.is_some() && flight.lead().map(|(_, led_on)| led_on) == blocked {
            return Err(this.deadlock_error(self.key)?);
        }
        let endless = self.request.patience == Patience::Endless;
        let target = Arc::clone(flight) as Arc<dyn Target>;
        let nested = this.begin_nested(&inside, blocked.as_slice(), &target, self.key, endless)?;
        Ok(Blocking { _nested: nested, _loop: blocked.map(BlockedLoop::begin) })
    }

    /// Waits in a seat that was taken. `None` as in `join`.
    fn sit(
        &self,
        place: Place<Python3>,
        blocking: Blocking,
        until: Option<Instant>,
    ) -> PyResult<Option<Answer<'py>>> {
        let (py, map) = (self.key.py(), Arc::clone(place.map()));
        loop {
            let standing = wait(py, until, |limit| {
                Some(place.wait(limit)).filter(|&standing| standing != Standing::Waiting)
            })?;
            place.pass_baton();
            match standing.unwrap_or(Standing::Waiting) {
                Standing::Waiting => {
                    place.count_timeout();
                    drop(place);
                    check_interrupt()?;
                    return Err(self.timeout_error(&map)?);
                }
                Standing::Offered => {
                    if let Some(lead) = place.take_lead(ffi::thread_number()) {
                        drop((place, blocking));
                        return self.lead(lead).map(Some);
                    }
                    // It was taken back in this moment; the next look tells why.
                }
                Standing::Landed => {
                    let outcome = place.outcome();
                    let answer = outcome.map(|outcome| Answer::of(py, outcome, place.flight(), Role::Waiter));
                    if answer.is_some() {
                        place.count_joined();
                    } else {
                        place.ask_again();
                    }
                    return Ok(answer);
                }
                Standing::Cancelled => return Err(cancelled_error(&map, self.key, false)?),
                Standing::Private | Standing::Withdrawn => {
                    place.ask_again();
                    return Ok(None);
                }
            }
        }
    }

    /// Runs the callable and ends the flight with what became of it.
    fn lead(&self, lead: Lead<Python3>) -> PyResult<Answer<'py>> {
        let this = self.coalescer.get();
        // Until the end, since how an error is settled may be for the user's code to say, too.
        let _led = Led::begin(Call::of(&lead));
        match self.run(&lead) {
            Ok((value, role)) => {
                let flight = self.request.detailed.then(|| Arc::clone(lead.flight()));
                let value = this.complete(lead, value, self.request.ttl)?;
                let (waiters, seconds) = flight.map_or((0, 0.0), |flight| flight.report());
                Ok(Answer { shared: Shared::Value(value), role, waiters, seconds })
            }
            Err(error) => {
                let exception = error.into_value(self.key.py()).into_bound(self.key.py()).into_any();
                this.settle_error(lead, &exception, self.request.ttl)?;
                Err(PyErr::from_value(exception))
            }
        }
    }

    /// Gets the value from the store, or from the callable.
    fn run(&self, lead: &Lead<Python3>) -> PyResult<(Bound<'py, PyAny>, Role)> {
        let this = self.coalescer.get();
        let store = this.store(self.key.py());
        if let Some(store) = store
            && let Some(value) = this.ask_store(store, self.key)?
        {
            lead.count_store_hit();
            return Ok((value, Role::Hit));
        }
        let value = ffi::call0(self.r#fn)?;
        if ffi::is_coroutine(&value) {
            return Err(self.refused(&value)?);
        }
        if let Some(store) = store {
            this.tell_store(store, lead, &value, self.request.ttl)?;
        }
        Ok((value, Role::Leader))
    }

    /// The error of a callable that returned a coroutine, which threads cannot share.
    fn refused(&self, coroutine: &Bound<'_, PyAny>) -> PyResult<PyErr> {
        let py = self.key.py();
        Ok(PyErr::from_value(ffi::call(Hooks::get(py)?.refuse.bind(py), [self.r#fn, coroutine])?))
    }

    fn timeout_error(&self, map: &Map<Python3>) -> PyResult<PyErr> {
        let none = self.key.py().None().into_bound(self.key.py());
        timeout_error(map, self.key, self.timeout.unwrap_or(&none))
    }
}

/// Blocks this thread, detached, until `block` has something for it, or until `until` has passed. Signals are answered.
pub(super) fn wait<T>(
    py: Python<'_>,
    until: Option<Instant>,
    block: impl Fn(Option<Duration>) -> Option<T>,
) -> PyResult<Option<T>> {
    /// How often the main thread looks for signals.
    const SIGNALS: Duration = Duration::from_millis(50);
    let slice = is_main_thread(py)?.then_some(SIGNALS);
    loop {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let limit = slice.into_iter().chain(left).min();
        let found = ffi::detached(py, || block(limit));
        if found.is_some() || left.is_some_and(|left| limit == Some(left)) {
            return Ok(found);
        }
        ffi::check_signals(py)?;
    }
}

/// Signals are handled in the main thread only.
fn is_main_thread(py: Python<'_>) -> PyResult<bool> {
    static MAIN: AtomicU64 = AtomicU64::new(0);
    /// The process that `MAIN` was asked in, counted from 1.
    static ASKED_IN: AtomicU32 = AtomicU32::new(0);
    let process = fork::birth() + 1;
    if ASKED_IN.load(Ordering::Acquire) != process {
        let threading = py.import(intern!(py, "threading"))?;
        let main = ffi::call(&threading.getattr(intern!(py, "main_thread"))?, [])?;
        MAIN.store(main.getattr(intern!(py, "ident"))?.extract()?, Ordering::Relaxed);
        ASKED_IN.store(process, Ordering::Release);
    }
    Ok(MAIN.load(Ordering::Relaxed) == ffi::thread_number())
}
