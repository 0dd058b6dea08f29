//! What running processes use: mounts in every mount namespace, swap, open files. One pass over `/proc` for all devices.
//!
//! A path alone tells little: a container has its own `/dev`. So a file is compared by device number where it is a
//! device, and by path besides.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, statx};
use serde::Serialize;

use super::Host;

/// A running process.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Process {
    pub pid: u32,
    /// Its short name, as `ps -o comm` shows it.
    pub command: String,
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pid {} ({})", self.pid, self.command)
    }
}

/// Major and minor number.
pub type DeviceNumber = (u32, u32);

/// A block or character device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Number {
    Block(DeviceNumber),
    Char(DeviceNumber),
}

/// A file system that is mounted somewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Of the device; not of btrfs, which makes up a number.
    pub device: DeviceNumber,
    pub at: String,
    /// What was mounted, as it was named then.
    pub source: String,
    /// In our own mount namespace.
    pub here: bool,
    /// One process of each other mount namespace that has it at this place.
    pub elsewhere: Vec<Process>,
}

/// A file that a process has open or mapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenFile {
    pub process: Process,
    /// Where the process found it.
    pub path: PathBuf,
    pub number: Option<Number>,
}

/// A device that a process got from VFIO. It stays in use when `/dev/vfio/N` has been closed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VfioDevice {
    pub process: Process,
    /// Its folder in sysfs; older kernels do not say.
    pub function: Option<PathBuf>,
}

/// All of it.
#[derive(Clone, Debug, Default)]
pub struct Processes {
    pub mounts: Vec<Mount>,
    /// Names of swap devices, as the kernel wrote them.
    pub swaps: Vec<PathBuf>,
    pub files: Vec<OpenFile>,
    pub vfio_devices: Vec<VfioDevice>,
    /// Processes whose open files or mounts we may not see.
    pub unseen: Vec<u32>,
}

impl Processes {
    /// What `/proc` says now. Our own process does not count.
    #[must_use]
    pub fn survey(host: &Host) -> Processes {
        let mut found = Processes {
            swaps: swaps(&read(&host.proc.join("swaps")).unwrap_or_default()),
            ..Processes::default()
        };
        let own = host.proc.join("self");
        let own_namespace = fs::read_link(own.join("ns/mnt")).ok();
        let mut mounts = MountTable::default();
        if let Ok(text) = read(&own.join("mountinfo")) {
            mounts.add(&text, None);
        }
        let mut namespaces: Vec<PathBuf> = own_namespace.into_iter().collect();
        for pid in pids(&host.proc) {
            if pid == std::process::id() {
                continue;
            }
            let folder = host.proc.join(pid.to_string());
            let process = Process {
                pid,
                command: command(&folder),
            };
            for folder in threads(&folder) {
                // Of others' processes an ordinary user sees the mounts, and not whose namespace they are in.
                let namespace = fs::read_link(folder.join("ns/mnt")).ok();
                let is_known = namespace.is_some();
                let is_new = namespace.is_none_or(|namespace| {
                    let is_new = !namespaces.contains(&namespace);
                    if is_new {
                        namespaces.push(namespace);
                    }
                    is_new
                });
                let seen = (|| {
                    if is_new {
                        let text = read(&folder.join("mountinfo"))?;
                        mounts.add(&text, Some((&process, is_known)));
                    }
                    found.files_of(host, &folder, &process)
                })();
                if seen.is_err_and(|error| !has_ended(&error)) && !found.unseen.contains(&pid) {
                    found.unseen.push(pid);
                }
            }
        }
        found.mounts = mounts.0.into_values().collect();
        found
    }

    fn files_of(&mut self, host: &Host, folder: &Path, process: &Process) -> io::Result<()> {
        for entry in fs::read_dir(folder.join("fd"))? {
            let link = entry?.path();
            let Ok(path) = fs::read_link(&link) else {
                continue;
            };
            if path.is_absolute() {
                let number = device_number(&link);
                if number.is_some() || path.starts_with(&host.dev) {
                    self.open(process, path, number);
                }
            } else if path == Path::new("anon_inode:[vfio-device]") {
                let name = link.file_name().unwrap_or_default();
                let details = read(&folder.join("fdinfo").join(name)).unwrap_or_default();
                self.vfio_devices.push(VfioDevice {
                    process: process.clone(),
                    function: vfio_function(&details),
                });
            }
        }
        // A mapping keeps a device open when its descriptor has been closed.
        for line in read(&folder.join("maps"))?.lines() {
            let path = line.find('/').and_then(|start| line.get(start..));
            let path = path
                .map(Path::new)
                .filter(|path| path.starts_with(&host.dev));
            if let Some(path) = path {
                self.open(process, path.to_owned(), None);
            }
        }
        Ok(())
    }

    fn open(&mut self, process: &Process, path: PathBuf, number: Option<Number>) {
        self.files.push(OpenFile {
            process: process.clone(),
            path,
            number,
        });
    }

    /// Who has one of these device files open, without repetition.
    #[must_use]
    pub fn holders(&self, path: &Path, number: Option<Number>) -> Vec<Process> {
        let deleted = format!("{} (deleted)", path.display());
        let same = |file: &&OpenFile| {
            (number.is_some() && file.number == number)
                || file.path == path
                || file.path == Path::new(&deleted)
        };
        let mut holders: Vec<Process> = self
            .files
            .iter()
            .filter(same)
            .map(|file| file.process.clone())
            .collect();
        holders.sort();
        holders.dedup();
        holders
    }
}

fn read(path: &Path) -> io::Result<String> {
    Ok(String::from_utf8_lossy(&fs::read(path)?).into_owned())
}

fn pids(proc: &Path) -> Vec<u32> {
    let entries = fs::read_dir(proc).into_iter().flatten().flatten();
    let mut pids: Vec<u32> = entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    pids.sort_unstable();
    pids
}

/// Where to look for what a process uses: its own folder. When its first thread has ended, that shows no files although
/// the other threads have some, and theirs are looked at.
fn threads(folder: &Path) -> Vec<PathBuf> {
    let some = |folder: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    };
    let threads = some(&folder.join("task"));
    if threads.is_empty() || !some(&folder.join("fd")).is_empty() {
        return vec![folder.to_owned()];
    }
    threads
}

/// A process that ends while we look has no folder any more, no such process (ESRCH) behind it, or no namespaces
/// (EINVAL). Any other error means that we may not see what there is.
fn has_ended(error: &io::Error) -> bool {
    let code = error.raw_os_error();
    error.kind() == ErrorKind::NotFound || code == Some(libc::ESRCH) || code == Some(libc::EINVAL)
}

fn command(folder: &Path) -> String {
    let text = read(&folder.join("comm")).unwrap_or_default();
    text.trim().to_owned()
}

/// Of an open file. Asks for what the kernel has in memory: a file on a server that is gone must not hold us up.
fn device_number(link: &Path) -> Option<Number> {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    let status = statx(CWD, link, flags, StatxFlags::TYPE).ok()?;
    let number = (status.stx_rdev_major, status.stx_rdev_minor);
    match FileType::from_raw_mode(u32::from(status.stx_mode)) {
        FileType::BlockDevice => Some(Number::Block(number)),
        FileType::CharacterDevice => Some(Number::Char(number)),
        _ => None,
    }
}

/// The line that newer kernels have in fdinfo: `vfio-device-syspath: /sys/devices/pci0000:00/0000:00:03.0`.
fn vfio_function(details: &str) -> Option<PathBuf> {
    let mut lines = details.lines();
    let path = lines.find_map(|line| line.strip_prefix("vfio-device-syspath:"))?;
    Some(PathBuf::from(path.trim()))
}

/// By device and place: processes in their own namespaces mostly see the same mounts as everyone.
#[derive(Default)]
struct MountTable(BTreeMap<(DeviceNumber, String, String), Mount>);

impl MountTable {
    /// `process` is one of another namespace, `None` stands for ours. One whose namespace is not known to be another
    /// counts only for mounts that nobody else has.
    fn add(&mut self, text: &str, process: Option<(&Process, bool)>) {
        for (device, at, source) in text.lines().filter_map(mountinfo_line) {
            let key = (device, at.clone(), source.clone());
            let mount = self.0.entry(key).or_insert_with(|| Mount {
                device,
                at,
                source,
                here: false,
                elsewhere: Vec::new(),
            });
            match process {
                None => mount.here = true,
                Some((_, false)) if mount.here || !mount.elsewhere.is_empty() => {}
                Some((process, _)) if !mount.elsewhere.contains(process) => {
                    mount.elsewhere.push(process.clone());
                }
                Some(_) => {}
            }
        }
    }
}

/// proc_pid_mountinfo(5): device, mount point, source.
fn mountinfo_line(line: &str) -> Option<(DeviceNumber, String, String)> {
    let (before, after) = line.split_once(" - ")?;
    let mut fields = before.split(' ');
    let device = parse_number(fields.nth(2)?)?;
    let at = unescape(fields.nth(1)?);
    let source = unescape(after.split(' ').nth(1)?);
    Some((device, at, source))
}

/// `259:0`
pub(super) fn parse_number(text: &str) -> Option<DeviceNumber> {
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// proc_swaps(5): the first column of each line but the first.
fn swaps(text: &str) -> Vec<PathBuf> {
    let names = text
        .lines()
        .skip(1)
        .filter_map(|line| line.split(' ').next());
    names.map(|name| PathBuf::from(unescape(name))).collect()
}

/// White space and backslashes in these tables are octal: `\040`.
fn unescape(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part
            .get(..3)
            .and_then(|code| u8::from_str_radix(code, 8).ok());
        match code {
            Some(code) => {
                out.push(char::from(code));
                out.push_str(part.get(3..).unwrap_or_default());
            }
            None => {
                out.push('\\');
                out.push_str(part);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_line_with_optional_fields_and_escapes_gives_device_place_and_source() {
        let line = r"36 35 259:2 / /data\040of\040mine rw,noatime shared:1 master:2 - ext4 /dev/nvme0n1p2 rw,errors=continue";
        assert_eq!(
            mountinfo_line(line),
            Some(((259, 2), "/data of mine".into(), "/dev/nvme0n1p2".into()))
        );
    }

    #[test]
    fn mountinfo_line_that_is_cut_short_is_nothing() {
        for line in [
            "",
            "36 35 259:2 / / rw",
            "36 35 x:2 / / rw - ext4 a rw",
            "1 - 2",
        ] {
            assert_eq!(mountinfo_line(line), None, "{line}");
        }
    }

    #[test]
    fn swaps_skip_the_heading_and_unescape() {
        let text = "Filename\t\t\t\tType\t\tSize\n/dev/nvme0n1p3                          partition\t1\n/swap\\040file file\t1\n";
        assert_eq!(
            swaps(text),
            [PathBuf::from("/dev/nvme0n1p3"), PathBuf::from("/swap file")]
        );
    }

    #[test]
    fn unescape_leaves_what_is_no_escape() {
        assert_eq!(unescape(r"a\134b\x\04"), r"a\b\x\04");
    }

    #[test]
    fn vfio_function_is_the_path_that_fdinfo_names() {
        let details = "pos:\t0\nflags:\t02000002\nvfio-device-syspath: /sys/devices/pci0000:00/0000:00:03.0\n";
        assert_eq!(
            vfio_function(details),
            Some(PathBuf::from("/sys/devices/pci0000:00/0000:00:03.0"))
        );
        assert_eq!(vfio_function("pos:\t0\n"), None);
    }

    #[test]
    fn device_number_of_an_open_device_is_found_under_any_name() {
        let null = fs::File::open("/dev/null").unwrap();
        let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&null));
        assert_eq!(device_number(Path::new(&link)), Some(Number::Char((1, 3))));
        assert_eq!(device_number(Path::new("/proc/self/comm")), None);
    }
}
