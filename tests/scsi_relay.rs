//! scsi_host.rs once more, for hosts whose logical units are on another device than the guest's ring.

#[path = "scsi_host.rs"]
mod scsi_host;
