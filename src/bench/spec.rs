//! What `--vhost-user` takes: a socket, and how its virtqueues are to be driven if not as the flags say for all.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::ValueEnum;

use super::args::{Interrupts, OnOff, RingKind};
use super::slots::Wishes;
use crate::config::split_at_commas;

/// `vm0.sock`, or `vm0.sock,ring=packed,indirect=off`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerSpec {
    /// As it was written: what reports call it.
    pub text: String,
    pub path: PathBuf,
    pub ring: Option<RingKind>,
    pub indirect: Option<OnOff>,
    pub event_idx: Option<OnOff>,
    pub interrupts: Option<Interrupts>,
    pub hugepages: Option<OnOff>,
    /// The process that serves, if it is not the one that made the socket.
    pub pid: Option<u32>,
    /// Where it tells what it counts.
    pub stats: Option<PathBuf>,
}

impl ServerSpec {
    /// What is said here, and what is not as `all` says it.
    #[must_use]
    pub fn wishes(&self, all: Wishes) -> Wishes {
        let or = |own: Option<OnOff>, all: bool| own.map_or(all, OnOff::is_on);
        Wishes {
            ring: self.ring.unwrap_or(all.ring),
            indirect: or(self.indirect, all.indirect),
            event_idx: or(self.event_idx, all.event_idx),
            interrupts: self.interrupts.unwrap_or(all.interrupts),
            hugepages: or(self.hugepages, all.hugepages),
        }
    }

    /// Both are the same socket, however it is written.
    #[must_use]
    pub fn is_same_socket(&self, other: &ServerSpec) -> bool {
        let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        real(&self.path) == real(&other.path)
    }
}

impl FromStr for ServerSpec {
    type Err = String;
    fn from_str(text: &str) -> Result<ServerSpec, String> {
        fn choice<T: ValueEnum>(key: &str, value: &str) -> Result<Option<T>, String> {
            T::from_str(value, false)
                .map(Some)
                .map_err(|_| format!("{key}: `{value}` is not known"))
        }
        let parts = split_at_commas(text);
        let (path, keys) = parts.split_first().ok_or("no socket is named")?;
        if path.is_empty() {
            return Err("no socket is named: write SOCKET or SOCKET,ring=packed".to_owned());
        }
        let mut spec = ServerSpec {
            text: text.to_owned(),
            path: path.into(),
            ring: None,
            indirect: None,
            event_idx: None,
            interrupts: None,
            hugepages: None,
            pid: None,
            stats: None,
        };
        for pair in keys {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            match key {
                "ring" => spec.ring = choice(key, value)?,
                "indirect" => spec.indirect = choice(key, value)?,
                "event_idx" => spec.event_idx = choice(key, value)?,
                "interrupts" => spec.interrupts = choice(key, value)?,
                "hugepages" => spec.hugepages = choice(key, value)?,
                "pid" => {
                    let pid = value.parse().ok().filter(|pid| *pid > 1);
                    spec.pid = Some(pid.ok_or_else(|| format!("pid: `{value}` is no server"))?);
                }
                "stats" if value.is_empty() => return Err("stats: no socket is named".to_owned()),
                "stats" => spec.stats = Some(value.into()),
                _ => {
                    return Err(format!(
                        "key `{key}` is none of ring, indirect, event_idx, interrupts, hugepages, pid and stats (a comma in \
                         a path is written ,,)"
                    ));
                }
            }
        }
        Ok(spec)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_goes_before_the_flag_for_all_and_a_doubled_comma_is_one_of_the_path() {
        let all = Wishes {
            ring: RingKind::Split,
            indirect: true,
            event_idx: true,
            interrupts: Interrupts::Off,
            hugepages: false,
        };
        let spec: ServerSpec = "a,,b.sock,ring=packed,indirect=off,pid=77".parse().unwrap();
        assert_eq!(spec.path, Path::new("a,b.sock"));
        assert_eq!(spec.pid, Some(77));
        let wishes = spec.wishes(all);
        assert_eq!(wishes.ring, RingKind::Packed);
        assert!(!wishes.indirect && wishes.event_idx);
        let spec: ServerSpec = "a.sock,stats=b=c.sock".parse().unwrap();
        assert_eq!(spec.stats.as_deref(), Some(Path::new("b=c.sock")));
        let plain: ServerSpec = "a=b.sock".parse().unwrap();
        assert_eq!(plain.path, Path::new("a=b.sock"));
        assert_eq!(plain.wishes(all).ring, RingKind::Split);
    }

    #[test]
    fn what_is_not_known_is_refused_by_its_name() {
        for (text, wanted) in [
            ("", "no socket"),
            ("a,ring=round", "`round`"),
            ("a,speed=9", "`speed`"),
            ("a,indirect", "indirect: ``"),
            ("a,stats=", "stats: no socket"),
            ("a,pid=1", "`1` is no server"),
        ] {
            let error = text.parse::<ServerSpec>().unwrap_err();
            assert!(error.contains(wanted), "{error}");
        }
    }
}
