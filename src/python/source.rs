//! The end of a shared stream where its items come from.

use std::sync::Arc;

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::PyWeakrefReference;

use super::coalescer::Coalescer;
use super::family::{TaskCall, check_interrupt, undisturbed};
use super::ffi;
use super::hooks::Hooks;
use super::inside::Within;
use super::options::{self, Ttl};
use super::streams::SharedStream;

/// Ends a stream with an error, as that is shared. False if it is not shared.
pub(super) fn end_with(
    coalescer: &Coalescer,
    stream: &Arc<SharedStream>,
    error: &Bound<'_, PyAny>,
    ttl: Option<Ttl>,
) -> PyResult<bool> {
    let py = error.py();
    if let Some((template, own_ttl)) = coalescer.shared_error(error, stream.ttl)? {
        stream.fail(template, ttl.unwrap_or(own_ttl));
        return Ok(true);
    }
    break_off(py, stream, error)?;
    Ok(false)
}

/// Ends a stream with an error that concerns its leader only.
fn break_off(py: Python<'_>, stream: &SharedStream, error: &Bound<'_, PyAny>) -> PyResult<()> {
    let template = ffi::call(Hooks::get(py)?.broken_stream_error.bind(py), [error])?;
    stream.break_off(Some(template.unbind()), true);
    Ok(())
}

/// Where the items of a stream come from that a task or a thread pumps. Dropping it unfinished breaks the stream.
#[pyclass(frozen, module = "llm_batch_coalesce._core")]
pub(super) struct StreamSource {
    pub(super) coalescer: Py<Coalescer>,
    pub(super) stream: Arc<SharedStream>,
}

#[pymethods]
impl StreamSource {
    /// Marks the current context as that of this call.
    fn enter(&self, py: Python<'_>) -> PyResult<()> {
        self.stream.call().map_or(Ok(()), |call| Within::enter(py, [call]))
    }

    /// Tells which task pumps, and whose reader leads.
    fn led_by(&self, task: &Bound<'_, PyAny>, caller: &Bound<'_, PyAny>) -> PyResult<()> {
        let weakly = |task| PyWeakrefReference::new(task).map(|weak| weak.into_any().unbind());
        self.stream.led_by(TaskCall { task: weakly(task)?, caller: weakly(caller)? });
        Ok(())
    }

    /// Adds an item. False if nobody reads any more: close upstream.
    fn append(&self, item: &Bound<'_, PyAny>) -> PyResult<bool> {
        self.coalescer.get().note(item);
        let goes_on = self.stream.append(item.clone().unbind(), false);
        if !goes_on {
            self.stream.pump_ends();
        }
        check_interrupt()?;
        Ok(goes_on)
    }

    /// Leaves something that the last reader to go closes, to wake a pump that waits for upstream. False if the stream is
    /// over, and it is the caller's own business.
    fn close_with(&self, closer: Py<PyAny>) -> bool {
        self.coalescer.get().note(closer.bind(ffi::attached()));
        self.stream.upstream.put(closer.into());
        // Whoever takes it out has it.
        !(self.stream.log.is_over() && self.stream.upstream.take().is_some())
    }

    /// From now on its task is not cancelled, since it is about to close upstream.
    fn ends(&self) {
        self.stream.pump_ends();
    }

    /// Has the stream go on though its last reader leaves.
    fn see_through(&self) {
        self.stream.log.see_through();
    }

    /// Ends the stream; `ttl_seconds` is for this one outcome.
    #[pyo3(signature = (ttl_seconds = None))]
    fn finish(
        &self,
        #[pyo3(from_py_with = options::own_ttl_seconds)] ttl_seconds: Option<Ttl>,
    ) -> PyResult<()> {
        let ttl = ttl_seconds.or(self.stream.ttl).unwrap_or(self.coalescer.get().ttl());
        self.stream.pump_ends();
        self.stream.finish(ttl);
        self.forget_closer()
    }

    /// Ends the stream with an error, shared if it is one to share; the original is for the reader that leads. False if
    /// nobody has it.
    #[pyo3(signature = (error, ttl_seconds = None))]
    fn fail(
        &self,
        error: &Bound<'_, PyAny>,
        #[pyo3(from_py_with = options::own_ttl_seconds)] ttl_seconds: Option<Ttl>,
    ) -> PyResult<bool> {
        self.stream.pump_ends();
        let has_it = self.stream.keep_for_leader(error);
        let shared = end_with(self.coalescer.get(), &self.stream, error, ttl_seconds)?;
        self.forget_closer()?;
        Ok(has_it || shared)
    }

    /// Ends the stream with an error that concerns the reader that leads only.
    fn break_off(&self, error: &Bound<'_, PyAny>) -> PyResult<()> {
        self.stream.pump_ends();
        self.stream.keep_for_leader(error);
        break_off(error.py(), &self.stream, error)?;
        self.forget_closer()
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.coalescer)
    }
}

impl StreamSource {
    /// A stream that has ended by itself keeps nothing of its upstream.
    fn forget_closer(&self) -> PyResult<()> {
        drop(self.stream.upstream.take());
        check_interrupt()
    }
}

impl Drop for StreamSource {
    fn drop(&mut self) {
        let py = ffi::attached();
        undisturbed(py, || self.stream.break_off(None, false));
    }
}
