//! The vhost-user side of a session: its memory table. The messages themselves
//! are handled in `control::session`. Start at [`memory::MemoryTable`].

mod huge;
pub mod memory;
