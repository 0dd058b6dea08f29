//! Persistent reservations over a restart (SPC-4, 5.13.5): a file for each namespace, in the directory that the
//! configuration names.
//!
//! A file is named after the namespace's own identity, so it is found again whatever the SSD or the socket is called. It is
//! written beside the old one, made durable and renamed: there is always one that is whole. One that cannot be understood
//! stops the start: nobody knows then whom it fences off.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use nvme_driver::Namespace;
use serde::{Deserialize, Serialize};

use crate::scsi::reservations::{Kind, Registrant, Reservation, Reservations};
use crate::scsi::{Initiator, Keep};

/// What the files are written in.
const VERSION: u32 = 1;

/// Why reservations cannot be kept, or what was kept cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The directory cannot be used.
    #[error(
        "cannot keep reservations in {}: {source} (state= names a directory that this user may write to)",
        path.display()
    )]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is not what it was when it was written.
    #[error(
        "reservations of namespace {namespace}: {}: {reason}. It says which guests are fenced off, so it is not ignored: \
         put back a copy of it, or remove it once no guest relies on its reservation",
        path.display()
    )]
    File {
        /// The file.
        path: PathBuf,
        /// Whose it is.
        namespace: String,
        /// What is wrong with it.
        reason: String,
    },
    /// One file cannot be that of two.
    #[error(
        "two namespaces that are served call themselves {0}: their reservations would be kept in one file (give the \
         devices serial=... of their own, or do without state=)"
    )]
    Twice(String),
}

/// The directory.
#[derive(Debug)]
pub struct StateDirectory {
    path: PathBuf,
    /// The namespaces that have a file.
    taken: BTreeSet<String>,
}

/// One namespace's file.
#[derive(Debug)]
pub struct StateFile {
    directory: PathBuf,
    namespace: String,
}

/// What is in a file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    version: u32,
    /// CRC-32C of `kept` as it is written here, in hexadecimal digits.
    checksum: String,
    kept: Kept,
}

/// Nothing but the version, which says whether the rest can be read.
#[derive(Deserialize)]
struct Head {
    version: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    namespace: String,
    registrants: Vec<KeptRegistrant>,
    reservation: Option<KeptReservation>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeptRegistrant {
    initiator: String,
    key: u64,
    all_ports: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeptReservation {
    /// TYPE, as SPC-4 counts them.
    kind: u8,
    /// Nobody in particular for those of all registrants.
    holder: Option<String>,
}

impl Kept {
    fn checksum(&self) -> io::Result<String> {
        let text = serde_json::to_vec(self)?;
        Ok(format!("{:08x}", crc32c::crc32c(&text)))
    }

    fn of(namespace: &str, reservations: &Reservations) -> Kept {
        let registrants = reservations.registrants().iter();
        let registrants = registrants.map(|registrant| KeptRegistrant {
            initiator: registrant.initiator.to_string(),
            key: registrant.key,
            all_ports: registrant.all_ports,
        });
        let reservation = reservations.reservation().map(|held| KeptReservation {
            kind: held.kind as u8,
            holder: held.holder.as_ref().map(Initiator::to_string),
        });
        Kept {
            namespace: namespace.to_owned(),
            registrants: registrants.collect(),
            reservation,
        }
    }

    fn reservations(&self) -> Option<Reservations> {
        let initiator = |name: &str| Initiator::new(name).ok();
        let registrants = self.registrants.iter().map(|kept| {
            Some(Registrant {
                initiator: initiator(&kept.initiator)?,
                key: kept.key,
                all_ports: kept.all_ports,
            })
        });
        let registrants = registrants.collect::<Option<Vec<Registrant>>>()?;
        let reservation = match &self.reservation {
            None => None,
            Some(kept) => Some(Reservation {
                kind: Kind::of(kept.kind)?,
                holder: match &kept.holder {
                    None => None,
                    Some(name) => Some(initiator(name)?),
                },
            }),
        };
        Reservations::restored(registrants, reservation)
    }
}

impl StateDirectory {
    /// The directory at `path`, made if need be.
    ///
    /// # Errors
    /// When nothing can be kept there.
    pub fn open(path: &Path) -> Result<StateDirectory, StateError> {
        let directory = StateDirectory {
            path: path.to_owned(),
            taken: BTreeSet::new(),
        };
        directory
            .try_out()
            .map_err(|source| StateError::Directory {
                path: path.to_owned(),
                source,
            })?;
        Ok(directory)
    }

    /// Better now than when a guest relies on it.
    fn try_out(&self) -> io::Result<()> {
        match fs::create_dir(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let probe = self.path.join(".tandem");
        write_durably(&probe, b"")?;
        fs::remove_file(&probe)?;
        sync_directory(&self.path)
    }

    /// The file of a namespace of the controller with this serial number, and what is kept there.
    ///
    /// # Errors
    /// When that is not what was written.
    pub fn file_of(
        &mut self,
        serial: &str,
        namespace: &Namespace,
    ) -> Result<(StateFile, Reservations), StateError> {
        let name = name_of(serial, namespace);
        if !self.taken.insert(name.clone()) {
            return Err(StateError::Twice(name));
        }
        let file = StateFile {
            directory: self.path.clone(),
            namespace: name,
        };
        let kept = file.read()?;
        Ok((file, kept))
    }
}

/// What a namespace is called for good: by its NGUID, EUI-64 or UUID, or else by its controller's serial number.
fn name_of(serial: &str, namespace: &Namespace) -> String {
    let hex = |bytes: &[u8]| {
        bytes.iter().fold(String::new(), |mut text, byte| {
            // Writing to a string cannot fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
    };
    let ids = &namespace.ids;
    if let Some(nguid) = &ids.nguid {
        return format!("nguid-{}", hex(nguid));
    }
    if let Some(eui64) = &ids.eui64 {
        return format!("eui64-{}", hex(eui64));
    }
    if let Some(uuid) = &ids.uuid {
        return format!("uuid-{}", hex(uuid));
    }
    format!("serial-{}-ns{}", hex(serial.as_bytes()), namespace.nsid.0)
}

impl StateFile {
    fn path(&self) -> PathBuf {
        self.directory.join(format!("{}.json", self.namespace))
    }

    fn read(&self) -> Result<Reservations, StateError> {
        let refuse = |reason: String| StateError::File {
            path: self.path(),
            namespace: self.namespace.clone(),
            reason,
        };
        let text = match fs::read(self.path()) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Reservations::default());
            }
            Err(error) => return Err(refuse(format!("it cannot be read: {error}"))),
        };
        let damaged = |error: serde_json::Error| refuse(format!("it is damaged: {error}"));
        let head: Head = serde_json::from_slice(&text).map_err(damaged)?;
        if head.version != VERSION {
            let version = head.version;
            return Err(refuse(format!(
                "it is of version {version}, and this server knows {VERSION}"
            )));
        }
        let record: Record = serde_json::from_slice(&text).map_err(damaged)?;
        let checksum = record.kept.checksum();
        if !checksum.is_ok_and(|checksum| checksum == record.checksum) {
            return Err(refuse(
                "it is damaged: its checksum is that of something else".to_owned(),
            ));
        }
        if record.kept.namespace != self.namespace {
            let other = &record.kept.namespace;
            return Err(refuse(format!("it is that of namespace {other}")));
        }
        let kept = record.kept.reservations();
        kept.ok_or_else(|| refuse("it says what no guest can have reserved".to_owned()))
    }

    fn write(&self, reservations: &Reservations) -> io::Result<()> {
        if reservations.is_persistent() {
            let kept = Kept::of(&self.namespace, reservations);
            let record = Record {
                version: VERSION,
                checksum: kept.checksum()?,
                kept,
            };
            let mut text = serde_json::to_vec_pretty(&record)?;
            text.push(b'\n');
            let fresh = self.directory.join(format!("{}.new", self.namespace));
            write_durably(&fresh, &text)?;
            fs::rename(&fresh, self.path())?;
        } else {
            match fs::remove_file(self.path()) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        sync_directory(&self.directory)
    }
}

impl Keep for StateFile {
    fn keep(&self, reservations: &Reservations) -> io::Result<()> {
        let written = self.write(reservations);
        if let Err(error) = &written {
            let path = self.path();
            tracing::error!(path = %path.display(), %error, "reservations cannot be kept: the guest's command fails");
        }
        written
    }
}

fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// A new name is durable with its directory.
fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}
