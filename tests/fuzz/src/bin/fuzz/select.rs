//! Which inputs are kept: few and small ones that together reach as much as they can.
//!
//! libFuzzer's merge keeps every input that reaches anything of its own, which is thousands of files; a repository
//! wants a bound. What it measured of each input stands in its control file:
//!
//! ```text
//!  3               how many files, and how many of them are kept already
//!  1
//!  corpus/a        their paths
//!  …
//!  STARTED 0 17    a file by its place, its size
//!  FT 0 1 2 3      what it reaches
//!  COV 0 5 6       (not of interest)
//! ```

use std::collections::HashSet;
use std::path::PathBuf;

/// Files of one target at most.
pub const FILES_MAX: usize = 190;

/// Their bytes together at most.
pub const BYTES_MAX: usize = 240 << 10;

/// Added to a file's size when it is weighed against what it reaches: a file costs something by being one.
const FILE_COST_BYTES: usize = 64;

/// One input as it was measured.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Measured {
    path: PathBuf,
    bytes: usize,
    reaches: Vec<u32>,
}

/// The files to keep, by a control file's text.
pub fn choose(control: &str) -> Vec<PathBuf> {
    let mut left = read(control);
    let (mut reached, mut bytes, mut chosen) = (HashSet::new(), 0, Vec::new());
    while chosen.len() < FILES_MAX {
        left.retain_mut(|file| {
            file.reaches.retain(|place| !reached.contains(place));
            !file.reaches.is_empty() && bytes + file.bytes <= BYTES_MAX
        });
        let worth =
            |file: &Measured| file.reaches.len() as f64 / (file.bytes + FILE_COST_BYTES) as f64;
        let best = (0..left.len()).max_by(|&a, &b| worth(&left[a]).total_cmp(&worth(&left[b])));
        let Some(best) = best else { break };
        let file = left.swap_remove(best);
        bytes += file.bytes;
        reached.extend(file.reaches);
        chosen.push(file.path);
    }
    chosen
}

fn read(control: &str) -> Vec<Measured> {
    let mut lines = control.lines();
    let count = lines.next().and_then(|line| line.parse().ok()).unwrap_or(0);
    lines.next();
    let mut files: Vec<Measured> = lines
        .by_ref()
        .take(count)
        .map(|path| Measured {
            path: path.into(),
            ..Measured::default()
        })
        .collect();
    for line in lines {
        let mut words = line.split(' ');
        let kind = words.next();
        let place = words.next().and_then(|word| word.parse::<usize>().ok());
        let Some(file) = place.and_then(|place| files.get_mut(place)) else {
            continue;
        };
        let mut numbers = words.filter_map(|word| word.parse::<u32>().ok());
        match kind {
            Some("STARTED") => file.bytes = numbers.next().unwrap_or(0) as usize,
            Some("FT") => file.reaches = numbers.collect(),
            _ => {}
        }
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_reaches_most_for_its_size_is_kept_and_what_reaches_nothing_more_is_not() {
        let control = "4\n1\nlarge\nsmall\nsame\nother\n\
            STARTED 0 5000\nFT 0 1 2 3\nCOV 0 9\nSTARTED 1 10\nFT 1 1 2 3\n\
            STARTED 2 20\nFT 2 2 3\nSTARTED 3 30\nFT 3 4\n";
        assert_eq!(choose(control), ["small", "other"].map(PathBuf::from));
    }

    #[test]
    fn the_bounds_hold() {
        let mut control = "1000\n0\n".to_owned();
        (0..1000).for_each(|file| control.push_str(&format!("f{file}\n")));
        (0..1000).for_each(|file| {
            control.push_str(&format!("STARTED {file} 4096\nFT {file} {file}\n"));
        });
        assert_eq!(choose(&control).len(), BYTES_MAX / 4096);
        let small = control.replace(" 4096\n", " 1\n");
        assert_eq!(choose(&small).len(), FILES_MAX);
    }
}
