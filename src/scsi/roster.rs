//! What one host shows to its initiator, as that changes: logical units are added and taken away while commands are under
//! way. For the control path, which may wait; those who carry commands out hold a [`Nexus`] and look for its successor.
//!
//! ```text
//!  Roster    ... -> Nexus n -- next --> Nexus n+1 (newest)      adds, takes away
//!                     ^                   ^
//!  lanes              | one that is idle  | one that has looked
//! ```
//! A logical unit that is taken away is absent from the next command on that looks; those before it end as they would
//! have. When they have ended, which the caller finds out, [`Roster::forget`] makes room for another.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::target::MAX_UNITS;
use super::unit::{Listen, LogicalUnit, ShareError, Tasks};
use super::{Lun, Nexus, Target};

/// Why a logical unit was not added.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    /// Another one is there.
    #[error("target {target} has LUN {} already: remove it first, or choose another place", lun.get())]
    Taken {
        /// The target's identifier.
        target: u8,
        /// The LUN.
        lun: Lun,
    },
    /// There is no index left.
    #[error("the host has {MAX_UNITS} logical units: remove one first")]
    Full,
    /// The initiator cannot have it.
    #[error(transparent)]
    Share(#[from] ShareError),
}

/// See the module.
#[derive(Debug)]
pub struct Roster(Mutex<Inner>);

#[derive(Debug)]
struct Inner {
    target: Arc<Target>,
    /// The newest of the initiator that is connected.
    nexus: Option<Arc<Nexus>>,
    tasks: Option<Weak<dyn Tasks>>,
    listener: Option<Arc<dyn Listen>>,
    /// Those that somebody may still hold, the oldest first: they are freed here, and not by a lane.
    past: VecDeque<Arc<Nexus>>,
    /// Indices whose logical units have no place, and no commands any more.
    vacant: Vec<usize>,
}

impl Inner {
    fn change(&mut self, target: Target) {
        self.target = Arc::new(target);
        if let Some(nexus) = &mut self.nexus {
            let next = nexus.succeed(Arc::clone(&self.target));
            self.past.push_back(std::mem::replace(nexus, next));
        }
        self.sweep();
    }

    /// Drops what nobody holds any more. Each holds its successor, so the oldest goes first.
    fn sweep(&mut self) {
        while let Some(oldest) = self.past.front()
            && Arc::strong_count(oldest) == 1
        {
            self.past.pop_front();
        }
    }
}

impl Roster {
    /// A host that shows `target`, to nobody yet.
    #[must_use]
    pub fn new(target: Target) -> Roster {
        Roster(Mutex::new(Inner {
            target: Arc::new(target),
            nexus: None,
            tasks: None,
            listener: None,
            past: VecDeque::new(),
            vacant: Vec::new(),
        }))
    }

    /// What others do to its logical units is for `listener` to tell.
    #[must_use]
    pub fn with_listener(self, listener: Arc<dyn Listen>) -> Roster {
        let mut inner = self.inner();
        inner.target.announce(None, &listener);
        inner.listener = Some(listener);
        drop(inner);
        self
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The initiator has come, or was reset; its commands are where `tasks` says.
    #[must_use]
    pub fn connect(&self, tasks: &Arc<dyn Tasks>) -> Arc<Nexus> {
        let mut inner = self.inner();
        let nexus = Nexus::new(Arc::clone(&inner.target)).with_tasks(tasks);
        let nexus = Arc::new(nexus);
        inner.tasks = Some(Arc::downgrade(tasks));
        let before = inner.nexus.replace(Arc::clone(&nexus));
        inner.past.extend(before);
        inner.sweep();
        nexus
    }

    /// It has gone.
    pub fn disconnect(&self) {
        let mut inner = self.inner();
        inner.tasks = None;
        if let Some(nexus) = inner.nexus.take() {
            nexus.end();
            inner.past.push_back(nexus);
        }
        inner.sweep();
    }

    /// The initiator, if it is connected, and what it reaches by now.
    #[must_use]
    pub fn nexus(&self) -> Option<Arc<Nexus>> {
        self.inner().nexus.clone()
    }

    /// What the host shows by now.
    #[must_use]
    pub fn target(&self) -> Arc<Target> {
        Arc::clone(&self.inner().target)
    }

    /// How many successors somebody has still to take up.
    #[must_use]
    pub fn behind(&self) -> usize {
        let mut inner = self.inner();
        inner.sweep();
        inner.past.len()
    }

    /// One logical unit more. The initiator is told by the others of the same target.
    ///
    /// # Errors
    /// [`PlaceError`]: nothing has changed then.
    pub fn add(&self, target: u8, lun: Lun, unit: LogicalUnit) -> Result<(), PlaceError> {
        let mut inner = self.inner();
        let own = Arc::clone(&inner.target);
        if own.find(target, lun).is_some() {
            return Err(PlaceError::Taken { target, lun });
        }
        // One that was here before gets its index back: nobody is to meet a unit at two of them.
        let mut vacant = inner.vacant.iter();
        let at = vacant
            .position(|index| own.units()[*index].is(&unit))
            .or_else(|| inner.vacant.len().checked_sub(1));
        if at.is_none() && own.units().len() >= MAX_UNITS {
            return Err(PlaceError::Full);
        }
        let at = at.map(|at| (at, inner.vacant[at]));
        let (next, index) = own.with_unit((target, lun), at.map(|(_, index)| index), unit)?;
        if let Some((at, _)) = at {
            inner.vacant.swap_remove(at);
        }
        let tasks = inner.tasks.as_ref().and_then(Weak::upgrade);
        next.greet(index, tasks.as_ref());
        if let Some(listener) = &inner.listener {
            next.announce(Some(index), listener);
        }
        inner.change(next);
        // After the change: who asks because of it finds the unit.
        inner.target.attend_inventory(target, index);
        Ok(())
    }

    /// The logical unit at a place is there no longer. Its index, for [`Self::forget`]; `None` if there was none.
    pub fn withdraw(&self, target: u8, lun: Lun) -> Option<usize> {
        let mut inner = self.inner();
        let (next, index) = inner.target.without((target, lun))?;
        inner.change(next);
        inner.target.attend_inventory(target, index);
        Some(index)
    }

    /// A logical unit has the size that `unit` has from now on, and the initiator is told. Its places.
    pub fn resize(&self, unit: &LogicalUnit) -> Vec<(u8, Lun)> {
        let mut inner = self.inner();
        let Some(next) = inner.target.resized(unit) else {
            return Vec::new();
        };
        inner.change(next);
        // After the change: who asks because of it is told the new size.
        inner.target.attend_size(unit)
    }

    /// There are no commands any more for a logical unit that was withdrawn.
    pub fn forget(&self, index: usize) {
        let mut inner = self.inner();
        inner.target.unshare(index);
        inner.vacant.push(index);
    }
}
