//! fio's job files, as far as `tandem bench` has the words: `[global]`, and sections that run one after the other.
//!
//! Nothing is ignored: a line that is not understood is refused by its number and text, since a benchmark that leaves
//! something out measures something else.

use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, anyhow};

use super::args::JobOptions;

/// The sections of a file, each complete with what `[global]` says above it.
///
/// # Errors
/// The file and line that is not understood.
pub fn read(path: &Path) -> anyhow::Result<Vec<(String, JobOptions)>> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read job file {}", path.display()))?;
    parse(&text, &path.display().to_string())
}

fn parse(text: &str, file: &str) -> anyhow::Result<Vec<(String, JobOptions)>> {
    let mut global = JobOptions::default();
    let mut sections: Vec<(String, JobOptions)> = Vec::new();
    let mut place = Place::Nowhere;
    // Which sections wait for the one before them; and whether those that follow do.
    let (mut waits, mut all_wait) = (Vec::new(), false);
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        let at = |what: String| anyhow!("{file}:{}: `{line}`: {what}", index + 1);
        if let Some(name) = line.strip_prefix('[') {
            let name = name
                .strip_suffix(']')
                .filter(|name| !name.is_empty())
                .ok_or_else(|| at("a section is written [name]".to_owned()))?;
            place = if name == "global" {
                Place::Global
            } else {
                sections.push((name.to_owned(), global.clone()));
                waits.push(all_wait || sections.len() == 1);
                Place::Section
            };
            continue;
        }
        let (key, value) = match line.split_once('=') {
            Some((key, value)) => (key.trim(), Some(value.trim())),
            None => (line, None),
        };
        let options = match place {
            Place::Nowhere => {
                return Err(at(
                    "it stands before the first section: write [global] above".to_owned(),
                ));
            }
            Place::Global => &mut global,
            Place::Section => &mut sections.last_mut().context("a section")?.1,
        };
        match (key, value) {
            ("stonewall", None | Some("1")) => match (place, waits.last_mut()) {
                (Place::Section, Some(waits)) => *waits = true,
                _ => all_wait = true,
            },
            // Time is all that ends a measurement here.
            ("time_based", None | Some("1")) => {}
            (key, Some(value)) => set(options, key, value).map_err(at)?,
            (_, None) => return Err(at(unknown(key))),
        }
    }
    if let Some(index) = waits.iter().position(|waits| !waits) {
        return Err(anyhow!(
            "{file}: job {} would run beside the one before it: sections are measured one after the other, so write \
             stonewall in it",
            sections[index].0
        ));
    }
    if sections.is_empty() {
        return Err(anyhow!(
            "{file} has no job: write a section such as [randread]"
        ));
    }
    Ok(sections)
}

#[derive(Clone, Copy)]
enum Place {
    Nowhere,
    Global,
    Section,
}

/// One line of a section.
fn set(options: &mut JobOptions, key: &str, value: &str) -> Result<(), String> {
    fn read<T: FromStr<Err: ToString>>(value: &str) -> Result<Option<T>, String> {
        value
            .parse()
            .map(Some)
            .map_err(|error: T::Err| error.to_string())
    }
    match key {
        "rw" | "readwrite" => options.rw = read(value)?,
        "rwmixread" => options.rwmixread = read(value)?,
        "fsync" => options.fsync = read(value)?,
        "bs" | "blocksize" => options.bs = read(value)?,
        "iodepth" => options.iodepth = read(value)?,
        "numjobs" => options.numjobs = read(value)?,
        "runtime" => options.runtime = read(value)?,
        "ramp_time" => options.ramp_time = read(value)?,
        "rate_iops" => options.rate_iops = read(value)?,
        "size" => options.size = read(value)?,
        "offset" => options.offset = read(value)?,
        "verify" => options.verify = read(value)?,
        "cpus_allowed" => options.cpus_allowed = read(value)?,
        "randseed" => options.randseed = read(value)?,
        _ => return Err(unknown(key)),
    }
    Ok(())
}

fn unknown(key: &str) -> String {
    match key {
        "ioengine" | "filename" | "directory" | "direct" => format!(
            "`{key}` says what is measured, which is a flag here: --device, --vhost-user or --file"
        ),
        _ => format!(
            "`{key}` is not known here; what is: rw, rwmixread, fsync, bs, iodepth, numjobs, runtime, ramp_time, \
             rate_iops, size, offset, verify, cpus_allowed, randseed, stonewall, time_based"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::args::Block;
    use crate::bench::io::Pattern;

    #[test]
    fn section_takes_what_global_says_above_it_and_its_own_word_goes_first() {
        let text = "; a comment\n[global]\nbs=8k\nrw=randread\nruntime=2\n\n[one]\n# another\n[two]\nstonewall\nbs = 512\nrw=randwrite\n";
        let jobs = parse(text, "f").unwrap();
        assert_eq!(jobs.len(), 2);
        assert_eq!(
            (jobs[0].0.as_str(), jobs[0].1.bs),
            ("one", Some(Block(8192)))
        );
        assert_eq!(jobs[1].1.bs, Some(Block(512)));
        assert_eq!(jobs[1].1.rw, Some(Pattern::RandWrite));
        assert_eq!(jobs[1].1.runtime, jobs[0].1.runtime);
    }

    #[test]
    fn line_that_is_not_understood_is_refused_by_number_and_text() {
        for (text, wanted) in [
            (
                "[a]\nioengine=libaio\n",
                "f:2: `ioengine=libaio`: `ioengine` says what",
            ),
            (
                "[a]\nbs=4k\nthinktime=5\n",
                "f:3: `thinktime=5`: `thinktime` is not known",
            ),
            (
                "[a]\ngroup_reporting\n",
                "f:2: `group_reporting`: `group_reporting` is not",
            ),
            ("[a]\nbs=5\n", "f:2: `bs=5`: `5` is no multiple"),
            ("bs=4k\n", "f:1: `bs=4k`: it stands before"),
            ("[a\n", "f:1: `[a`: a section is"),
            ("[a]\n[b]\n", "job b would run beside"),
            ("[global]\nbs=4k\n", "f has no job"),
        ] {
            let error = parse(text, "f").unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
    }

    #[test]
    fn stonewall_in_global_holds_for_every_section_below() {
        assert_eq!(
            parse("[global]\nstonewall\n[a]\n[b]\n", "f").unwrap().len(),
            2
        );
    }
}
