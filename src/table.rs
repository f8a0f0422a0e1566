//! Keys to flights. Reading takes no lock, and electing the leader is one atomic operation.

use crate::clock::Nanos;
use crate::family::Family;
use crate::flight::Flight;
use crate::sync::Arc;

/// What became of an attempt to put a new flight into the table.
pub(crate) enum Claim<F: Family> {
    /// It is in; the flight that it replaces, an expired or ended one, is out.
    Claimed { replaced: Option<Arc<Flight<F>>> },
    /// Another live flight has the key.
    Taken(Arc<Flight<F>>),
    /// A comparison of keys failed, and nothing was changed.
    Failed,
}

#[cfg(not(loom))]
pub(crate) use lock_free::Table;
#[cfg(loom)]
pub(crate) use locked::Table;

#[cfg(not(loom))]
mod lock_free {
    use std::hash::{BuildHasherDefault, Hash, Hasher};

    use papaya::{Compute, Equivalent, Guard, HashMap, Operation};

    use super::{Arc, Claim, Family, Flight, Nanos};

    /// Flights by their own keys: the table's key is the flight, which holds the hash and the key proper.
    pub(crate) struct Table<F: Family>(HashMap<Entry<F>, (), BuildHasherDefault<HashAsIs>>);

    struct Entry<F: Family>(Arc<Flight<F>>);

    impl<F: Family> Hash for Entry<F> {
        fn hash<H: Hasher>(&self, state: &mut H) {
            state.write_u64(self.0.hash());
        }
    }

    impl<F: Family> PartialEq for Entry<F> {
        fn eq(&self, other: &Self) -> bool {
            self.0.hash() == other.0.hash() && F::same(self.0.key(), other.0.key())
        }
    }

    impl<F: Family> Eq for Entry<F> {}

    struct ByKey<'a, F: Family> {
        hash: u64,
        key: &'a F::Key,
    }

    impl<F: Family> Hash for ByKey<'_, F> {
        fn hash<H: Hasher>(&self, state: &mut H) {
            state.write_u64(self.hash);
        }
    }

    impl<F: Family> Equivalent<Entry<F>> for ByKey<'_, F> {
        #[inline]
        fn equivalent(&self, entry: &Entry<F>) -> bool {
            self.hash == entry.0.hash() && F::same(entry.0.key(), self.key)
        }
    }

    /// Finds a flight without asking its key, which would run foreign code.
    struct ByIdentity<'a, F: Family>(&'a Arc<Flight<F>>);

    impl<F: Family> Hash for ByIdentity<'_, F> {
        fn hash<H: Hasher>(&self, state: &mut H) {
            state.write_u64(self.0.hash());
        }
    }

    impl<F: Family> Equivalent<Entry<F>> for ByIdentity<'_, F> {
        fn equivalent(&self, entry: &Entry<F>) -> bool {
            Arc::ptr_eq(self.0, &entry.0)
        }
    }

    /// Hands on the hash that a key brings along.
    #[derive(Default)]
    struct HashAsIs(u64);

    impl Hasher for HashAsIs {
        fn finish(&self) -> u64 {
            self.0
        }

        fn write(&mut self, bytes: &[u8]) {
            for &byte in bytes {
                self.0 = self.0.rotate_left(8) ^ u64::from(byte);
            }
        }

        fn write_u64(&mut self, hash: u64) {
            self.0 = hash;
        }
    }

    impl<F: Family> Table<F> {
        pub(crate) fn new() -> Self {
            Self(HashMap::builder().hasher(BuildHasherDefault::default()).build())
        }

        /// Reads the flight of a key while the table keeps it alive.
        #[inline]
        pub(crate) fn read<R>(
            &self,
            hash: u64,
            key: &F::Key,
            look: impl FnOnce(&Arc<Flight<F>>) -> R,
        ) -> Option<R> {
            let table = self.0.pin();
            table.get_key_value(&ByKey::<F> { hash, key }).map(|(entry, ())| look(&entry.0))
        }

        pub(crate) fn claim(&self, flight: &Arc<Flight<F>>, now: Nanos) -> Claim<F> {
            let guard = self.0.guard();
            let choose = |found: Option<(&Entry<F>, &())>| match found {
                _ if F::comparison_failed() => Operation::Abort(None),
                Some((entry, ())) if entry.0.is_live(now) => Operation::Abort(Some(Arc::clone(&entry.0))),
                _ => Operation::Insert(()),
            };
            let outcome = self.0.compute(Entry(Arc::clone(flight)), choose, &guard);
            match outcome {
                Compute::Updated { old, .. } => {
                    let replaced = Some(Arc::clone(&old.0.0));
                    guard.flush();
                    Claim::Claimed { replaced }
                }
                Compute::Aborted(Some(flight)) => Claim::Taken(flight),
                Compute::Aborted(None) => Claim::Failed,
                Compute::Inserted(..) | Compute::Removed(..) => Claim::Claimed { replaced: None },
            }
        }

        /// Removes this very flight. True if it was still there.
        ///
        /// What is removed is dropped once no reader can see it, by this thread if it [flushes](Self::flush).
        pub(crate) fn remove(&self, flight: &Arc<Flight<F>>) -> bool {
            self.0.pin().remove(&ByIdentity(flight)).is_some()
        }

        /// Drops what this thread has removed, at once or when the readers that may see it are done.
        pub(crate) fn flush(&self) {
            self.0.guard().flush();
        }

        pub(crate) fn len(&self) -> usize {
            self.0.len()
        }

        pub(crate) fn for_each(&self, mut look: impl FnMut(&Arc<Flight<F>>)) {
            for (entry, ()) in &self.0.pin() {
                look(&entry.0);
            }
        }
    }
}

/// The same operations as one short critical section each, for loom.
#[cfg(loom)]
mod locked {
    use super::{Arc, Claim, Family, Flight, Nanos};
    use crate::sync::Mutex;

    pub(crate) struct Table<F: Family>(Mutex<Vec<Arc<Flight<F>>>>);

    impl<F: Family> Table<F> {
        pub(crate) fn new() -> Self {
            Self(Mutex::new(Vec::new()))
        }

        pub(crate) fn read<R>(
            &self,
            hash: u64,
            key: &F::Key,
            look: impl FnOnce(&Arc<Flight<F>>) -> R,
        ) -> Option<R> {
            let flights = self.0.lock();
            let found = flights.iter().find(|f| f.hash() == hash && F::same(f.key(), key)).cloned();
            drop(flights);
            found.map(|flight| look(&flight))
        }

        pub(crate) fn claim(&self, flight: &Arc<Flight<F>>, now: Nanos) -> Claim<F> {
            let mut flights = self.0.lock();
            let place =
                flights.iter_mut().find(|f| f.hash() == flight.hash() && F::same(f.key(), flight.key()));
            match place {
                Some(found) if found.is_live(now) => Claim::Taken(Arc::clone(found)),
                Some(found) => {
                    Claim::Claimed { replaced: Some(std::mem::replace(found, Arc::clone(flight))) }
                }
                None => {
                    flights.push(Arc::clone(flight));
                    Claim::Claimed { replaced: None }
                }
            }
        }

        pub(crate) fn remove(&self, flight: &Arc<Flight<F>>) -> bool {
            let mut flights = self.0.lock();
            let place = flights.iter().position(|found| Arc::ptr_eq(found, flight));
            let removed = place.map(|place| flights.swap_remove(place));
            drop(flights);
            removed.is_some()
        }

        pub(crate) fn flush(&self) {}

        pub(crate) fn len(&self) -> usize {
            self.0.lock().len()
        }

        pub(crate) fn for_each(&self, look: impl FnMut(&Arc<Flight<F>>)) {
            let flights = self.0.lock().clone();
            flights.iter().for_each(look);
        }
    }
}
