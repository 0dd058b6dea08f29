//! LOG SENSE (SPC-4, 6.8 and 7.3; SBC-3, 6.3): what the device has said of its health. Whoever controls the device asks it
//! every so often and leaves the answer in a [`Health`]; a command takes it from there, however old it is.

use std::sync::atomic::{AtomicU64, Ordering};

use super::sense::Sense;
use super::target::Seat;
use super::unit::LogicalUnit;
use super::{Action, Exchange, Result};

/// How a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HealthReport {
    /// In degrees Celsius, 0 at least; FFh if it is not known.
    pub temperature: u8,
    /// The highest temperature at which it works as it should; FFh if that is not known.
    pub reference_temperature: u8,
    /// Percent of its life used, as its maker estimates. May exceed 100.
    pub used: u8,
    /// ASC and ASCQ of what is wrong with it; zeroes if nothing is.
    pub exception: (u8, u8),
}

/// The last [`HealthReport`] of a device, shared by its logical units.
#[derive(Debug, Default)]
pub struct Health {
    /// Its five bytes, and a 1 above them once there is one.
    word: AtomicU64,
}

impl Health {
    /// The device has been asked.
    pub fn set(&self, report: HealthReport) {
        let (asc, ascq) = report.exception;
        let (now, most) = (report.temperature, report.reference_temperature);
        let word = u64::from_be_bytes([0, 0, 1, now, most, report.used, asc, ascq]);
        self.word.store(word, Ordering::Relaxed);
    }

    /// What it said; nothing before it was asked for the first time.
    #[must_use]
    pub fn get(&self) -> Option<HealthReport> {
        let [
            _,
            _,
            known,
            temperature,
            reference_temperature,
            used,
            asc,
            ascq,
        ] = self.word.load(Ordering::Relaxed).to_be_bytes();
        (known != 0).then_some(HealthReport {
            temperature,
            reference_temperature,
            used,
            exception: (asc, ascq),
        })
    }
}

const UNKNOWN: u8 = 0xff;
const ALL_SUBPAGES: u8 = 0xff;

/// A parameter: its code and up to four bytes.
type Parameter = (u16, [u8; 4], usize);
type Page = (u8, fn(&LogicalUnit) -> Result<[Option<Parameter>; 2]>);

/// The pages with parameters, in the order of their codes; these are in the order of theirs.
const PAGES: &[Page] = &[
    // Temperature (SPC-4, 7.3.20): now, and as it should be at most.
    (0x0d, |unit| {
        let report = unit.health().get();
        let (now, most) = report.map_or((UNKNOWN, UNKNOWN), |report| {
            (report.temperature, report.reference_temperature)
        });
        Ok([Some((0, [0, now, 0, 0], 2)), Some((1, [0, most, 0, 0], 2))])
    }),
    // Solid state media: percentage used endurance indicator.
    (0x11, |unit| {
        let report = unit.health().get().ok_or(Sense::INTERNAL_FAILURE)?;
        Ok([Some((1, [0, 0, 0, report.used], 4)), None])
    }),
    // Informational exceptions (SPC-4, 7.3.8). What follows the temperature is vendor specific; many put the highest one
    // there, and sg_logs shows it.
    (0x2f, |unit| {
        let report = unit.health().get();
        let ((asc, ascq), now, most) = report.map_or(((0, 0), UNKNOWN, UNKNOWN), |report| {
            let most = report.reference_temperature;
            (report.exception, report.temperature, most)
        });
        Ok([Some((0, [asc, ascq, now, most], 4)), None])
    }),
];

pub(super) fn log_sense(seat: &Seat<'_>, exchange: &mut Exchange<'_>) -> Result<Action> {
    let (unit, _) = seat.unit()?;
    let cdb = exchange.cdb;
    // All parameters are of lists, of which there is one value whatever PC asks for.
    let (code, subpage, pointer) = (cdb.byte(2) & 0x3f, cdb.byte(3), cdb.be16(5));
    let own = PAGES.iter().find(|(own, _)| *own == code);
    if own.is_none() && code != 0 {
        return Err(Sense::in_cdb(2, 5));
    }
    let list = code == 0 || subpage == ALL_SUBPAGES;
    if subpage != 0 && subpage != ALL_SUBPAGES {
        return Err(Sense::in_cdb(3, 7));
    }
    if list && pointer != 0 {
        return Err(Sense::in_cdb(5, 7));
    }
    let out = &mut exchange.data_in;
    match own {
        Some((_, parameters)) if !list => {
            // DS: nothing is saved.
            out.put(&[0x80 | code, 0, 0, 0]);
            let parameters = parameters(unit)?;
            let wanted = parameters
                .iter()
                .flatten()
                .filter(|(own, ..)| *own >= pointer);
            for (own, value, len) in wanted {
                out.put(&own.to_be_bytes());
                // Of a list, in binary.
                out.put(&[0x03, u8::try_from(*len).unwrap_or(0)]);
                out.put(&value[..*len]);
            }
            if out.len() == 4 {
                return Err(Sense::in_cdb(5, 7));
            }
        }
        _ => supported(code, subpage, out),
    }
    let len = u16::try_from(out.len() - 4).unwrap_or(0);
    out.set(2, &len.to_be_bytes());
    out.truncate(cdb.be16(7).into());
    Ok(Action::Good)
}

/// The list of pages, or with the subpages of each; of all pages if `code` is 0, and of that page otherwise
/// (SPC-4, 7.3.16 to 7.3.18).
fn supported(code: u8, subpage: u8, out: &mut super::DataIn<'_>) {
    if subpage == 0 {
        out.put(&[0; 4]);
        out.put(&[0]);
        PAGES.iter().for_each(|(own, _)| out.put(&[*own]));
        return;
    }
    // SPF.
    out.put(&[0x40 | code, subpage, 0, 0]);
    let codes = std::iter::once(0).chain(PAGES.iter().map(|(own, _)| *own));
    for own in codes.filter(|own| code == 0 || *own == code) {
        out.put(&[own, 0, own, ALL_SUBPAGES]);
    }
}
