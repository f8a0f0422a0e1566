//! What a caller asks for, and what it gets.

use pyo3::prelude::*;

use super::family::{Outcome, Python3, Shared};
use super::ffi;
use super::hooks::Hooks;
use super::options::{self, Patience, Ttl};
use crate::flight::Flight;
use crate::map::{Found, Map};

/// What a caller asks for besides the key.
#[derive(Clone, Copy)]
pub(super) struct Request {
    pub(super) patience: Patience,
    pub(super) ttl: Option<Ttl>,
    /// Whether the caller wants an `Outcome` and not only the value.
    pub(super) detailed: bool,
}

impl Request {
    pub(super) const PLAIN: Self = Self { patience: Patience::Endless, ttl: None, detailed: false };

    pub(super) fn new(
        timeout: Option<&Bound<'_, PyAny>>,
        ttl_seconds: Option<&Bound<'_, PyAny>>,
        detailed: bool,
    ) -> PyResult<Self> {
        let ttl = ttl_seconds.map(options::ttl_seconds).transpose()?;
        Ok(Self { patience: options::timeout(timeout)?, ttl, detailed })
    }
}

/// How a caller got its outcome.
#[derive(Clone, Copy)]
pub(super) enum Role {
    Leader,
    Waiter,
    Hit,
}

/// An outcome on its way to a caller, and what is known of its flight.
pub(super) struct Answer<'py> {
    pub(super) shared: Shared<'py>,
    pub(super) role: Role,
    pub(super) waiters: u32,
    pub(super) seconds: f32,
}

impl<'py> Answer<'py> {
    pub(super) fn of(py: Python<'py>, outcome: &Outcome, flight: &Flight<Python3>, role: Role) -> Self {
        let (waiters, seconds) = flight.report();
        Self { shared: outcome.share(py), role, waiters, seconds }
    }

    /// The value, or an `Outcome` with it.
    pub(super) fn into_result(self, py: Python<'py>, detailed: bool) -> PyResult<Bound<'py, PyAny>> {
        let value = self.shared.into_result()?;
        if !detailed {
            return Ok(value);
        }
        let role = match self.role {
            Role::Leader => "leader",
            Role::Waiter => "waiter",
            Role::Hit => "hit",
        };
        let arguments =
            (role.into_pyobject(py)?, self.waiters.into_pyobject(py)?, self.seconds.into_pyobject(py)?);
        ffi::call(Hooks::get(py)?.outcome.bind(py), [&value, &arguments.0, &arguments.1, &arguments.2])
    }
}

/// Looks for a key, and takes only the value of a hit.
#[inline]
pub(super) fn find_value<'py>(
    map: &Map<Python3>,
    hash: u64,
    key: &Bound<'py, PyAny>,
) -> PyResult<Found<Python3, Shared<'py>>> {
    map.find(hash, key.as_unbound(), |outcome, _| outcome.share(key.py()))
}

pub(super) fn find<'py>(
    map: &Map<Python3>,
    hash: u64,
    key: &Bound<'py, PyAny>,
) -> PyResult<Found<Python3, Answer<'py>>> {
    map.find(hash, key.as_unbound(), |outcome, flight| Answer::of(key.py(), outcome, flight, Role::Hit))
}
