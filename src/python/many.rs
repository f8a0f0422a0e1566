//! Many keys at once: those that nobody has are led together, in one call.
//!
//! A caller joins flights before it runs its own call, so that it has their outcomes even if these are not retained. But it
//! begins to wait for them only when its own flights have ended: so callers whose keys overlap never wait in a circle.

use std::sync::Arc;

use pyo3::exceptions::PyException;
use pyo3::prelude::*;
use pyo3::types::PyList;

use super::answer::{Request, find};
use super::coalescer::Coalescer;
use super::errors::timeout_error;
use super::family::Python3;
use super::hooks::Hooks;
use super::inside::{Call, Inside, Led};
use super::options::{self, Patience};
use super::thread::Asked;
use super::{ffi, key};
use crate::flight::Flight;
use crate::lead::{Lead, Place};
use crate::map::{Found, Map};
use crate::waiter::{LoopId, NO_LOOP, Wakeup};

/// How a key stands when a caller of many begins.
pub(super) enum Admitted<'py, J> {
    /// What is retained; or why it cannot be waited for.
    Known(PyResult<Bound<'py, PyAny>>),
    Leads(Lead<Python3>),
    Joined(J),
}

/// Looks for each key, joins its flight, or claims one.
pub(super) fn admit<'py, J>(
    coalescer: &Coalescer,
    keys: &[Bound<'py, PyAny>],
    loop_id: LoopId,
    inside: impl Fn(Python<'py>) -> PyResult<Inside>,
    request: Request,
    join: impl Fn(&Arc<Map<Python3>>, &Arc<Flight<Python3>>) -> PyResult<Option<J>>,
    refuse: impl Fn(&J),
) -> PyResult<Vec<Admitted<'py, J>>> {
    let mut admitted = Vec::with_capacity(keys.len());
    // The next key's `__eq__` may ask for one that was claimed before.
    let mut claimed = Vec::new();
    let refused = keys.iter().find_map(|key| {
        let found = admit_one(coalescer, key, loop_id, &inside, request, &join);
        let keep = |found| {
            if let Admitted::Leads(lead) = &found {
                claimed.push(Led::begin(Call::of(lead)));
            }
            admitted.push(found);
        };
        found.map(keep).err()
    });
    drop(claimed);
    let Some(error) = refused else { return Ok(admitted) };
    // What is refused is no request.
    for admitted in admitted {
        match admitted {
            Admitted::Known(_) => {}
            Admitted::Leads(lead) => lead.refuse(),
            Admitted::Joined(joined) => refuse(&joined),
        }
    }
    Err(error)
}

fn admit_one<'py, J>(
    coalescer: &Coalescer,
    key: &Bound<'py, PyAny>,
    loop_id: LoopId,
    inside: impl Fn(Python<'py>) -> PyResult<Inside>,
    request: Request,
    join: impl Fn(&Arc<Map<Python3>>, &Arc<Flight<Python3>>) -> PyResult<Option<J>>,
) -> PyResult<Admitted<'py, J>> {
    let hash = key::hash(key)?;
    loop {
        let map = coalescer.map();
        match find(map, hash, key)? {
            Found::Hit(answer) => return Ok(Admitted::Known(answer.shared.into_result())),
            Found::Nothing => {
                if let Some(lead) = coalescer.claim(map, hash, key, loop_id)? {
                    return Ok(Admitted::Leads(lead));
                }
            }
            Found::Pending(flight) => {
                if inside(key.py())?.includes(&flight) {
                    return Err(coalescer.recursive_error(key)?);
                }
                if request.patience == Patience::None {
                    map.count_timeout(hash);
                    let zero = 0_u8.into_pyobject(key.py())?;
                    return Ok(Admitted::Known(Err(timeout_error(map, key, zero.as_any())?)));
                }
                if let Some(joined) = join(map, &flight)? {
                    return Ok(Admitted::Joined(joined));
                }
            }
        }
    }
}

/// Serves a thread that wants many keys.
pub(super) fn get_or_call_many<'py>(
    coalescer: &Bound<'py, Coalescer>,
    keys: &Bound<'py, PyAny>,
    r#fn: &Bound<'py, PyAny>,
    timeout: Option<&Bound<'py, PyAny>>,
    ttl_seconds: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let (py, this) = (keys.py(), coalescer.get());
    let request = Request::new(timeout, ttl_seconds, false)?;
    options::callable("fn", r#fn)?;
    let wanted = distinct(keys)?;
    let join = |map: &Arc<Map<Python3>>, flight: &Arc<Flight<Python3>>| {
        Ok(map.join_busy(flight, NO_LOOP, Wakeup::this_thread()))
    };
    let admitted = admit(this, &wanted, NO_LOOP, Inside::of_thread, request, join, Place::ask_again)?;
    let mut answers: Vec<Option<PyResult<Bound<'py, PyAny>>>> = Vec::new();
    let (mut leads, mut places) = (Vec::new(), Vec::new());
    for (index, admitted) in admitted.into_iter().enumerate() {
        answers.push(match admitted {
            Admitted::Known(answer) => Some(answer),
            Admitted::Leads(lead) => {
                leads.push((index, lead));
                None
            }
            Admitted::Joined(place) => {
                places.push((index, place));
                None
            }
        });
    }
    let asked = Batch { coalescer, wanted: &wanted, r#fn, timeout, request };
    asked.lead(leads, &mut answers)?;
    asked.wait(places, &mut answers)?;
    let (values, errors) = (PyList::empty(py), PyList::empty(py));
    for answer in answers {
        match answer.unwrap_or_else(|| Ok(py.None().into_bound(py))) {
            Ok(value) => {
                values.append(value)?;
                errors.append(py.None())?;
            }
            Err(error) => {
                values.append(py.None())?;
                errors.append(error.into_value(py))?;
            }
        }
    }
    let wanted = PyList::new(py, &wanted)?;
    ffi::call(Hooks::get(py)?.gather.bind(py), [wanted.as_any(), values.as_any(), errors.as_any()])
}

/// The keys without those that are equal to one before, in their order.
fn distinct<'py>(keys: &Bound<'py, PyAny>) -> PyResult<Vec<Bound<'py, PyAny>>> {
    let distinct = ffi::call(Hooks::get(keys.py())?.distinct.bind(keys.py()), [keys])?;
    Ok(distinct.cast::<PyList>()?.iter().collect())
}

/// A request of a thread for many keys.
struct Batch<'a, 'py> {
    coalescer: &'a Bound<'py, Coalescer>,
    wanted: &'a [Bound<'py, PyAny>],
    r#fn: &'a Bound<'py, PyAny>,
    timeout: Option<&'a Bound<'py, PyAny>>,
    request: Request,
}

type Answers<'py> = [Option<PyResult<Bound<'py, PyAny>>>];

impl<'py> Batch<'_, 'py> {
    /// Ends all flights that this caller leads. Raises what its call raises.
    fn lead(&self, leads: Vec<(usize, Lead<Python3>)>, answers: &mut Answers<'py>) -> PyResult<()> {
        let this = self.coalescer.get();
        let _led: Vec<_> = leads.iter().map(|(_, lead)| Led::begin(Call::of(lead))).collect();
        let mut leads = self.ask_store(leads, answers)?;
        if leads.is_empty() {
            return Ok(());
        }
        match self.call(&leads) {
            Ok(values) => {
                // An interrupt of the one is raised when the others have landed, too.
                let mut interrupted = Ok(());
                for ((index, lead), value) in leads.drain(..).zip(values) {
                    let answer = match value {
                        Ok(value) => this.complete(lead, value, self.request.ttl).map(Ok),
                        Err(error) => this
                            .settle_error(lead, &error, self.request.ttl)
                            .map(|_| Err(PyErr::from_value(error))),
                    };
                    match answer {
                        Ok(answer) => answers[index] = Some(answer),
                        Err(error) => interrupted = interrupted.and(Err(error)),
                    }
                }
                interrupted
            }
            Err(error) => {
                let py = self.coalescer.py();
                let exception = error.into_value(py).into_bound(py).into_any();
                let mut interrupted = Ok(false);
                for (_, lead) in leads {
                    interrupted = interrupted.and(this.settle_error(lead, &exception, self.request.ttl));
                }
                interrupted.and_then(|_| Err(PyErr::from_value(exception)))
            }
        }
    }

    /// Completes what the store has, and returns what is left.
    fn ask_store(
        &self,
        leads: Vec<(usize, Lead<Python3>)>,
        answers: &mut Answers<'py>,
    ) -> PyResult<Vec<(usize, Lead<Python3>)>> {
        let this = self.coalescer.get();
        let Some(store) = this.store(self.coalescer.py()) else { return Ok(leads) };
        let mut left = Vec::with_capacity(leads.len());
        for (index, lead) in leads {
            match this.ask_store(store, &self.wanted[index])? {
                Some(value) => {
                    lead.count_store_hit();
                    answers[index] = Some(Ok(this.complete(lead, value, self.request.ttl)?));
                }
                None => left.push((index, lead)),
            }
        }
        Ok(left)
    }

    /// Runs the callable. Of each key that is led, in order, its value or the error that it lacks one.
    fn call(
        &self,
        leads: &[(usize, Lead<Python3>)],
    ) -> PyResult<Vec<Result<Bound<'py, PyAny>, Bound<'py, PyAny>>>> {
        let (py, this) = (self.coalescer.py(), self.coalescer.get());
        let hooks = Hooks::get(py)?;
        let missing = PyList::new(py, leads.iter().map(|(index, _)| &self.wanted[*index]))?;
        let result = ffi::call(self.r#fn, [missing.as_any()])?;
        if ffi::is_coroutine(&result) {
            return Err(PyErr::from_value(ffi::call(hooks.refuse.bind(py), [self.r#fn, &result])?));
        }
        // The callable may have changed the list that it was given.
        let missing = PyList::new(py, leads.iter().map(|(index, _)| &self.wanted[*index]))?;
        let matched = ffi::call(hooks.match_values.bind(py), [missing.as_any(), &result])?;
        let mut values = Vec::with_capacity(leads.len());
        for ((_, lead), matched) in leads.iter().zip(matched.try_iter()?) {
            let (value, error): (Bound<'py, PyAny>, Bound<'py, PyAny>) = matched?.extract()?;
            if !error.is_none() {
                values.push(Err(error));
                continue;
            }
            if let Some(store) = this.store(py) {
                this.tell_store(store, lead, &value, self.request.ttl)?;
            }
            values.push(Ok(value));
        }
        Ok(values)
    }

    /// Waits for what others lead, one after another. Raises at once what is no `Exception`.
    fn wait(&self, places: Vec<(usize, Place<Python3>)>, answers: &mut Answers<'py>) -> PyResult<()> {
        let py = self.coalescer.py();
        let mut until = None;
        for (index, place) in places {
            let key = &self.wanted[index];
            let single = ffi::call(Hooks::get(py)?.single.bind(py), [self.r#fn, key])?;
            let asked = Asked {
                coalescer: self.coalescer,
                hash: place.flight().hash(),
                key,
                r#fn: &single,
                timeout: self.timeout,
                request: self.request,
            };
            let answer = asked.come_for(place, &mut until).and_then(|answer| answer.shared.into_result());
            match answer {
                Err(error) if !error.is_instance_of::<PyException>(py) => return Err(error),
                answer => answers[index] = Some(answer),
            }
        }
        Ok(())
    }
}
