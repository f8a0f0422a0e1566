//! The coalescer of threads: hit, wait and lead without entering a Python frame of this package.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use super::answer::{Answer, Request, Role, find, find_value};
use super::coalescer::{Coalescer, Options, cancelled_error, timeout_error};
use super::family::{Python3, Shared, running_loop};
use super::hooks::Hooks;
use super::inside::{Inside, Led};
use super::options::{self, ErrorTtl, Patience, Ttl};
use super::{ffi, key};
use crate::circle::BlockedLoop;
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
        max_flight_seconds=None, max_retained=None, name=None)")]
    fn new(
        _arguments: &Bound<'_, PyTuple>,
        _options: Option<&Bound<'_, PyDict>>,
    ) -> PyClassInitializer<Self> {
        PyClassInitializer::from(Coalescer::default()).add_subclass(Self)
    }

    #[pyo3(signature = (ttl_seconds = Ttl::DEFAULT, *, error_ttl_seconds = ErrorTtl::Same, private_errors = None,
        max_flight_seconds = None, max_retained = None, name = None))]
    fn __init__(
        slf: &Bound<'_, Self>,
        #[pyo3(from_py_with = options::ttl_seconds)] ttl_seconds: Ttl,
        #[pyo3(from_py_with = options::error_ttl_seconds)] error_ttl_seconds: ErrorTtl,
        #[pyo3(from_py_with = options::private_errors)] private_errors: Option<Py<PyTuple>>,
        #[pyo3(from_py_with = options::max_flight_seconds)] max_flight_seconds: Option<Ttl>,
        #[pyo3(from_py_with = options::max_retained)] max_retained: Option<u64>,
        #[pyo3(from_py_with = options::name)] name: Option<Arc<str>>,
    ) -> PyResult<()> {
        slf.as_super().get().make(Options {
            ttl: ttl_seconds,
            error_ttl: error_ttl_seconds,
            private_errors,
            max_flight: max_flight_seconds,
            max_retained,
            finishes: false,
            name,
        })
    }

    /// Returns the outcome of `key`: the one retained, that of the call under way, or that of calling `fn()`.
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

    /// The same with what is known of the flight.
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

/// A request of a thread.
struct Asked<'a, 'py> {
    coalescer: &'a Bound<'py, Coalescer>,
    hash: u64,
    key: &'a Bound<'py, PyAny>,
    r#fn: &'a Bound<'py, PyAny>,
    timeout: Option<&'a Bound<'py, PyAny>>,
    request: Request,
}

impl<'a, 'py> Asked<'a, 'py> {
    fn follow(
        &self,
        mut map: &'a Arc<Map<Python3>>,
        mut found: Found<Python3, Answer<'py>>,
    ) -> PyResult<Answer<'py>> {
        let this = self.coalescer.get();
        if !matches!(found, Found::Hit(_)) {
            options::callable("fn", self.r#fn)?;
        }
        let mut until = None;
        loop {
            match found {
                Found::Hit(answer) => return Ok(answer),
                Found::Nothing => {
                    if let Some(lead) = this.claim(map, self.hash, self.key, NO_LOOP)? {
                        return self.lead(lead);
                    }
                }
                Found::Pending(flight) => {
                    if let Some(answer) = self.join(map, flight, &mut until)? {
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
        let (py, this) = (self.key.py(), self.coalescer.get());
        let inside = Inside::of_thread(py)?;
        if inside.includes(&flight) {
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
        let nested = this.begin_nested(&inside, blocked.as_slice(), &flight, self.key, self.request)?;
        let blocked = blocked.map(BlockedLoop::begin);
        let Some(place) = map.join(&flight, NO_LOOP, Wakeup::this_thread()) else { return Ok(None) };
        drop(flight);
        loop {
            match wait(py, &place, *until)? {
                Standing::Waiting => {
                    place.count_timeout();
                    drop(place);
                    return Err(self.timeout_error(map)?);
                }
                Standing::Offered => {
                    if let Some(lead) = place.take_lead(ffi::thread_number()) {
                        drop((place, nested, blocked));
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
                Standing::Cancelled => return Err(cancelled_error(map, self.key, false)?),
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
        let _led = Led::begin(&lead);
        let result = match ffi::call0(self.r#fn) {
            Ok(value) if ffi::is_coroutine(&value) => Err(self.refused(&value)?),
            result => result,
        };
        match result {
            Ok(value) => {
                let flight = self.request.detailed.then(|| Arc::clone(lead.flight()));
                let value = this.complete(lead, value, self.request.ttl)?;
                let (waiters, seconds) = flight.map_or((0, 0.0), |flight| flight.report());
                Ok(Answer { shared: Shared::Value(value), role: Role::Leader, waiters, seconds })
            }
            Err(error) => {
                let exception = error.into_value(self.key.py()).into_bound(self.key.py()).into_any();
                this.settle_error(lead, &exception, self.request.ttl)?;
                Err(PyErr::from_value(exception))
            }
        }
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

/// Waits until the flight has something for this thread, or until `until` has passed.
fn wait(py: Python<'_>, place: &Place<Python3>, until: Option<Instant>) -> PyResult<Standing> {
    /// How often the main thread looks for signals.
    const SIGNALS: Duration = Duration::from_millis(50);
    let slice = is_main_thread(py)?.then_some(SIGNALS);
    loop {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let limit = slice.into_iter().chain(left).min();
        let standing = ffi::detached(py, || place.wait(limit));
        if standing != Standing::Waiting {
            place.pass_baton();
            return Ok(standing);
        }
        if left.is_some_and(|left| limit == Some(left)) {
            return Ok(standing);
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
