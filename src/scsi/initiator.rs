//! Initiators: who a front-end is, for the reservations that it makes.

use std::fmt;

use super::DataIn;

/// An initiator port: its iSCSI name (RFC 7143, 4.2.7). It stays the same over connections and restarts, so reservations
/// are its and not a connection's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Initiator(String);

/// Why a name is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InitiatorError {
    /// Too long for an iSCSI name.
    #[error("it has {0} bytes, and an iSCSI name at most {MAX_NAME}")]
    Long(usize),
    /// No iSCSI name has this character.
    #[error("{0:?} is no character of a name: use a-z, 0-9, '-', '.' and ':'")]
    Character(char),
    /// It has no characters.
    #[error("it is empty")]
    Empty,
}

/// RFC 7143, 4.2.7.
const MAX_NAME: usize = 223;
/// The longest TransportID.
pub(super) const MAX_TRANSPORT_ID: usize = 4 + (MAX_NAME + 1).next_multiple_of(4);
/// What a name that is none of iSCSI's own is made one with.
const PREFIX: &str = "iqn.2025-01.internal.tandem:";

impl Initiator {
    /// The initiator of this name: one of iSCSI's (`iqn.`, `eui.`, `naa.`) as it is, and any other one made one of them.
    /// Upper case is lower case.
    ///
    /// # Errors
    /// When iSCSI has no such name.
    pub fn new(name: &str) -> Result<Initiator, InitiatorError> {
        let name = name.to_ascii_lowercase();
        if name.is_empty() {
            return Err(InitiatorError::Empty);
        }
        if let Some(stray) = name.chars().find(|char| !is_allowed(*char)) {
            return Err(InitiatorError::Character(stray));
        }
        let own = ["iqn.", "eui.", "naa."];
        let name = match own.iter().any(|prefix| name.starts_with(prefix)) {
            true => name,
            false => format!("{PREFIX}{name}"),
        };
        match name.len() {
            0..=MAX_NAME => Ok(Initiator(name)),
            len => Err(InitiatorError::Long(len)),
        }
    }

    /// The initiator behind a socket that was given no name: what `place` has of a name, the rest as dashes.
    ///
    /// # Panics
    /// When `place` is longer than any socket's path.
    #[must_use]
    pub fn of_socket(place: &str) -> Initiator {
        let place = place.trim_matches('/').to_ascii_lowercase();
        let name = place.chars().map(|char| match char {
            '/' => '.',
            char if is_allowed(char) => char,
            _ => '-',
        });
        let name = format!("{PREFIX}{}", name.collect::<String>());
        assert!(name.len() <= MAX_NAME, "a socket's path has 107 bytes");
        Initiator(name)
    }

    /// Its iSCSI name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0
    }

    /// Its TransportID (SPC-4, 7.6.4.6), of format 00b: the name, terminated and padded.
    pub(super) fn transport_id(&self, out: &mut DataIn<'_>) {
        const ISCSI: u8 = 0x05;
        const SHORTEST: usize = 20;
        let len = (self.0.len() + 1).next_multiple_of(4).max(SHORTEST);
        let [high, low] = u16::try_from(len).unwrap_or(0).to_be_bytes();
        out.put(&[ISCSI, 0, high, low]);
        out.put(self.0.as_bytes());
        out.put(&[0; SHORTEST][..len - self.0.len()]);
    }
}

fn is_allowed(char: char) -> bool {
    char.is_ascii_lowercase() || char.is_ascii_digit() || ['-', '.', ':'].contains(&char)
}

impl fmt::Display for Initiator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
