//! What outlives a command: the record of what was bound, and the user that an SSD was handed to.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nvme_driver::vfio::pci::PciAddress;
use serde::{Deserialize, Serialize};

use super::Host;
use super::effects::Effects;

/// What is known of a function that vfio-pci has, where sysfs no longer says it. Kept until unbind or reboot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub address: String,
    /// The driver that had it; `None` when none had.
    pub driver: Option<String>,
    pub model: Option<String>,
    pub serial: Option<String>,
    /// Bytes.
    pub size: Option<u64>,
    /// The block devices that were there and should be again.
    pub namespaces: Vec<String>,
}

impl Record {
    #[must_use]
    pub fn folder(host: &Host) -> PathBuf {
        host.run.join("tandem/vfio")
    }

    #[must_use]
    pub fn path(host: &Host, address: PciAddress) -> PathBuf {
        Record::folder(host).join(format!("{address}.json"))
    }

    /// `None` when there is none.
    ///
    /// # Errors
    /// When there is one that cannot be read or understood.
    pub fn load(host: &Host, address: PciAddress) -> io::Result<Option<Record>> {
        match fs::read(Record::path(host, address)) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// # Errors
    /// When it cannot be written.
    pub fn save(
        &self,
        host: &Host,
        effects: &mut dyn Effects,
        address: PciAddress,
    ) -> Result<(), String> {
        let path = Record::path(host, address);
        let text = serde_json::to_string(self).map_err(|error| error.to_string())?;
        effects
            .save(&path, &format!("{text}\n"))
            .map_err(|error| format!("cannot write {}: {error}", path.display()))
    }
}

/// A user of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    pub name: String,
    pub id: u32,
}

impl User {
    /// By name from `/etc/passwd`, or by number.
    ///
    /// # Errors
    /// When there is no such name there.
    pub fn find(host: &Host, name: &str) -> Result<User, String> {
        let path = host.etc.join("passwd");
        let text = fs::read_to_string(&path)
            .map_err(|error| format!("cannot read {}: {error}", path.display()))?;
        let ids = text.lines().filter_map(|line| {
            let mut fields = line.split(':');
            let known = fields.next()?;
            Some((known, fields.nth(1)?.parse::<u32>().ok()?))
        });
        let by_name = ids.clone().find(|(known, _)| *known == name);
        let id = by_name.map(|(_, id)| id).or_else(|| by_number(name));
        match id {
            Some(id) => Ok(User {
                name: name.to_owned(),
                id,
            }),
            None => Err(format!(
                "user `{name}` is not in {} (of a user that is elsewhere, give the number: id -u {name})",
                path.display()
            )),
        }
    }
}

/// Digits only: `u32::from_str` would also take `+1`.
fn by_number(text: &str) -> Option<u32> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| digits)
}

/// Where udev reads who owns `/dev/vfio/N`.
#[must_use]
pub fn rules_path(host: &Host) -> PathBuf {
    host.etc.join("udev/rules.d/70-tandem-vfio.rules")
}

const RULES_HEADING: &str = "# Who may use SSDs through VFIO, a line each: written by `setup-vfio bind --user`, removed by unbind.\n";

/// A group is called by its number, which may be another after a reboot, so the rule asks which group has the function.
fn rule(address: PciAddress, user: &User) -> String {
    format!(
        "SUBSYSTEM==\"vfio\", TEST==\"{}\", OWNER=\"{}\", MODE=\"0600\"\n",
        member_test(address),
        user.name
    )
}

fn member_test(address: PciAddress) -> String {
    format!("/sys/kernel/iommu_groups/%k/devices/{address}")
}

/// The rules without those of `address`, and with `user`'s if there is one.
fn rules_with(text: &str, address: PciAddress, user: Option<&User>) -> String {
    let test = format!("\"{}\"", member_test(address));
    let mut kept: Vec<String> = text
        .lines()
        .filter(|line| !line.contains(&test))
        .map(|line| format!("{line}\n"))
        .collect();
    if let Some(user) = user {
        if kept.is_empty() {
            kept.push(RULES_HEADING.to_owned());
        }
        kept.push(rule(address, user));
    }
    kept.concat()
}

/// Makes the rules say that `user` owns the group of `address`, or nobody. Writes only what changes, and removes a file
/// in which nothing is left to say.
///
/// # Errors
/// When the file cannot be read or written.
pub fn set_rule(
    host: &Host,
    effects: &mut dyn Effects,
    address: PciAddress,
    user: Option<&User>,
) -> Result<(), String> {
    let path = rules_path(host);
    let cannot =
        |what: &str, error: io::Error| format!("cannot {what} {}: {error}", path.display());
    let text = match fs::read_to_string(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        text => text.map_err(|error| cannot("read", error))?,
    };
    let wanted = rules_with(&text, address, user);
    if wanted == text {
        return Ok(());
    }
    if wanted.lines().all(|line| line.starts_with('#')) {
        effects
            .remove(&path)
            .map_err(|error| cannot("remove", error))?;
    } else {
        effects
            .save(&path, &wanted)
            .map_err(|error| cannot("write", error))?;
    }
    // udev looks for changed rules by itself within seconds; without udev the rule waits for it.
    let _ = effects.run("udevadm", &["control", "--reload"]);
    Ok(())
}

/// What the files of pam_limits say of locked memory for a user, line by line, where it can apply.
fn memlock_lines(host: &Host, user: &User) -> Vec<(PathBuf, String)> {
    let folder = host.etc.join("security");
    let mut files = vec![folder.join("limits.conf")];
    let mut more: Vec<PathBuf> = fs::read_dir(folder.join("limits.d"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "conf")
        })
        .collect();
    more.sort();
    files.append(&mut more);
    let mut found = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).unwrap_or_default();
        for line in text.lines() {
            let line = line.split('#').next().unwrap_or_default();
            let fields: Vec<&str> = line.split_whitespace().collect();
            if let [domain, _, "memlock", _] = fields.as_slice()
                && (*domain == user.name || *domain == "*" || domain.starts_with('@'))
            {
                found.push((file.clone(), fields.join(" ")));
            }
        }
    }
    found
}

/// What `user` needs besides the device file, a line each.
#[must_use]
pub fn advice(host: &Host, user: &User) -> Vec<String> {
    let name = &user.name;
    let mut lines = vec![
        format!(
            "{name}: all memory that an SSD may reach (the guests' whole memory) counts as locked memory of the process"
        ),
        format!(
            "{name}: the limit of a service or a session cannot be read from here; `ulimit -l` shows it in place"
        ),
    ];
    let found = memlock_lines(host, user);
    if found.is_empty() {
        lines.push(format!(
            "{name}: {} and limits.d say nothing about memlock: the default of 8 MiB or less is too little",
            host.etc.join("security/limits.conf").display()
        ));
    }
    for (file, line) in found {
        lines.push(format!("{name}: {} has: {line}", file.display()));
    }
    lines.extend([
        format!("{name}: for sessions, in /etc/security/limits.d/tandem.conf:  {name} - memlock unlimited"),
        format!("{name}: for a systemd service, in its [Service] section:  LimitMEMLOCK=infinity"),
        format!(
            "{name}: huge pages need no hand-over: memfd_create with MFD_HUGETLB takes free ones from any user"
        ),
    ]);
    lines
}

/// Gives `/dev/vfio/N` away.
///
/// # Errors
/// As the kernel answers.
pub fn hand_over(effects: &mut dyn Effects, node: &Path, user: &User) -> Result<(), String> {
    effects
        .chown(node, user.id)
        .map_err(|error| format!("cannot give {} to {}: {error}", node.display(), user.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alice() -> User {
        User {
            name: "alice".into(),
            id: 1000,
        }
    }

    #[test]
    fn rules_with_a_user_has_one_line_per_address_however_often() {
        let address = "5e:00.0".parse().unwrap();
        let once = rules_with("", address, Some(&alice()));
        assert_eq!(
            once,
            format!(
                "{RULES_HEADING}SUBSYSTEM==\"vfio\", TEST==\"/sys/kernel/iommu_groups/%k/devices/0000:5e:00.0\", \
                 OWNER=\"alice\", MODE=\"0600\"\n"
            )
        );
        assert_eq!(rules_with(&once, address, Some(&alice())), once);
        let bob = User {
            name: "bob".into(),
            id: 1001,
        };
        let other = rules_with(&once, address, Some(&bob));
        assert_eq!(other, once.replace("alice", "bob"));
        let both = rules_with(&once, "5f:00.0".parse().unwrap(), Some(&bob));
        assert_eq!(both.lines().count(), 3);
        assert_eq!(rules_with(&both, "5f:00.0".parse().unwrap(), None), once);
    }
}
