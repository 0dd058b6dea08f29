//! The vhost-user side of a session: its memory table and the containment of faults in it. The messages themselves
//! are handled in `control::session`. Start at [`memory::MemoryTable`].

pub mod fault;
pub mod memory;
