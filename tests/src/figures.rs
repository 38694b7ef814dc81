//! What a bench prints: a table for people, one JSON object for programs.

use serde::Serialize;

/// One bench's result.
#[derive(Debug, Serialize)]
pub struct Result {
    /// The bench's name.
    pub bench: String,
    /// What it ran on.
    pub machine: String,
    /// What it measured.
    pub figures: Vec<Figure>,
}

/// One figure; a ratio says value ÷ peer, both from the same run.
#[derive(Debug, Serialize)]
pub struct Figure {
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: f64,
    /// The value's unit.
    pub unit: String,
    /// What it is compared with, and that one's value.
    pub peer: Option<String>,
    /// value ÷ peer's value.
    pub ratio: Option<f64>,
}

impl Result {
    /// An empty result of that bench on this machine.
    pub fn new(bench: &str) -> Result {
        Result {
            bench: bench.into(),
            machine: machine(),
            figures: Vec::new(),
        }
    }

    /// Adds a figure.
    pub fn add(&mut self, name: &str, value: f64, unit: &str) {
        self.figures.push(Figure {
            name: name.into(),
            value,
            unit: unit.into(),
            peer: None,
            ratio: None,
        });
    }

    /// Adds a figure beside what the same run measured of something else.
    pub fn add_beside(&mut self, name: &str, value: f64, unit: &str, peer: &str, peer_value: f64) {
        self.figures.push(Figure {
            name: name.into(),
            value,
            unit: unit.into(),
            peer: Some(format!("{peer}: {peer_value:.3} {unit}")),
            ratio: Some(value / peer_value),
        });
    }

    /// Prints the table on stderr and, if asked, the object on stdout.
    pub fn print(&self, json: bool) {
        eprintln!("{} on {}", self.bench, self.machine);
        for figure in &self.figures {
            let beside = match (&figure.peer, figure.ratio) {
                (Some(peer), Some(ratio)) => format!("   {ratio:.2} × {peer}"),
                _ => String::new(),
            };
            eprintln!(
                "  {:<32} {:>12.3} {}{beside}",
                figure.name, figure.value, figure.unit
            );
        }
        if json {
            match serde_json::to_string(self) {
                Ok(text) => println!("{text}"),
                Err(error) => eprintln!("the result has no JSON: {error}"),
            }
        }
    }
}

/// Cores, processor and kernel.
fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'))
        .map_or("?", |(_, model)| model.trim());
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!("{cores} × {model}, Linux {}", kernel.trim())
}

/// The value below which that share of the values lies (nearest rank); 0 of none.
pub fn percentile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::percentile;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let values = [4.0, 1.0, 3.0, 2.0];
        assert_eq!(percentile(&values, 0.5), 2.0);
        assert_eq!(percentile(&values, 0.99), 4.0);
        assert_eq!(percentile(&values, 0.0), 1.0);
        assert_eq!(percentile(&[], 0.5), 0.0);
    }
}
