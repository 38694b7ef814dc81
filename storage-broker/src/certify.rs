//! Trying what a server really enforces, with files of our own, before machines rely on it.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use bytes::Bytes;
use cluster_model::ids::Token;
use cluster_model::settle::{SETTLE_MS_MAX, SETTLE_MS_MIN, certified_ms};
use futures::stream::{FuturesUnordered, StreamExt};

use crate::fence::{DISK_MODE, claimant, data_credential};
use crate::nfs::client::SetAttributes;
use crate::nfs::{Credential, FileHandle, NfsClient, NfsError, Stable, Status};

/// How strong a volume's fence is; the strongest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FenceClass {
    /// The storage server checks the token on every call.
    GidToken,
    /// Nobody checks, but a host that loses its lease is reset by its watchdog in time.
    Time,
    /// Nothing: failover only by hand.
    None,
}

impl FenceClass {
    /// The class as it is written in the log and on the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            FenceClass::GidToken => "gid-token",
            FenceClass::Time => "time",
            FenceClass::None => "none",
        }
    }
}

/// What the trials showed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// The class.
    pub class: FenceClass,
    /// A takeover waits at least so long, ms.
    pub settle_ms: u32,
    /// One line a trial.
    pub report: String,
}

/// Tokens of the trials: the last ones, which no machine will ever have.
const OLD: Token = Token(Token::LIMIT - 3);
const NEW: Token = Token(Token::LIMIT - 2);

/// Swaps under a flood of WRITEs, to see how late the last of them lands, when a volume is added: somebody waits for
/// it, a second or two. A landing that is late once in a hundred swaps is not seen by so few; the settle time is ten
/// times the latest seen, and never less than its minimum.
pub const FLOOD_ROUNDS: u32 = 12;

/// The same where nobody waits: enough to see what happens once in a hundred.
pub const FLOOD_ROUNDS_THOROUGH: u32 = 200;

/// WRITEs of the flood in flight.
const FLOOD_IN_FLIGHT: usize = 32;

/// The flood of one round stops so long after the swap.
const FLOOD_AFTER: Duration = Duration::from_millis(60);

/// The class of a directory: time, where an armed watchdog resets a host that has lost its lease.
pub fn certify_directory(watchdog_armed: bool) -> Certificate {
    let device = std::path::Path::new("/dev/watchdog").exists();
    let (class, report) = match (device, watchdog_armed) {
        (true, true) => (
            FenceClass::Time,
            "a watchdog resets this host when its lease is lost",
        ),
        (true, false) => (
            FenceClass::None,
            "/dev/watchdog exists but is not armed: start the broker with --watchdog-armed once it is",
        ),
        (false, _) => (
            FenceClass::None,
            "no storage server checks tokens in a directory, and this host has no /dev/watchdog: failover only by hand",
        ),
    };
    Certificate {
        class,
        settle_ms: SETTLE_MS_MIN,
        report: report.into(),
    }
}

/// Tries the fence, with so many swaps under a flood of WRITEs. `owner_side` and `holder_side` are connections to the
/// same export.
///
/// # Errors
/// When not even a file to try with can be made; all else is in the certificate.
pub async fn certify(
    owner_side: &NfsClient,
    holder_side: &NfsClient,
    broker_uid: u32,
    flood_rounds: u32,
) -> Result<Certificate, NfsError> {
    let name = format!(".baton-certify-{:016x}", rand::random::<u64>());
    let directory = owner_side.root();
    let attributes = SetAttributes {
        mode: Some(DISK_MODE),
        gid: Some(OLD.gid()),
        size_bytes: None,
    };
    let file = owner_side
        .create(claimant(broker_uid, OLD), directory, &name, attributes)
        .await?;
    let mut trial = Trial {
        owner_side,
        holder_side,
        broker_uid,
        flood_rounds,
        file,
        ok: true,
        report: String::new(),
    };
    let lag = match trial.run().await {
        Ok(lag) => lag,
        Err(error) => {
            trial.note(false, &format!("a trial did not end: {error}"));
            Duration::ZERO
        }
    };
    let broker = Credential {
        uid: broker_uid,
        gid: broker_uid,
    };
    if let Err(error) = owner_side.remove(broker, directory, &name).await {
        trial.note(true, &format!("the file `{name}` stays behind: {error}"));
    }
    Ok(certificate(trial.ok, lag, trial.report))
}

/// What the trials come to: a server that refuses rightly and lets WRITEs land too late fences nobody.
fn certificate(ok: bool, lag: Duration, mut report: String) -> Certificate {
    let lag_us = u64::try_from(lag.as_micros()).unwrap_or(u64::MAX);
    let (class, settle_ms) = match certified_ms(lag_us) {
        Ok(settle_ms) if ok => (FenceClass::GidToken, settle_ms),
        Ok(settle_ms) => (FenceClass::None, settle_ms),
        Err(needed_ms) => {
            let _ = writeln!(
                report,
                "FAIL a takeover would have to wait {needed_ms} ms for late WRITEs, over the {SETTLE_MS_MAX} ms that any takeover waits: failover only by hand"
            );
            (FenceClass::None, SETTLE_MS_MAX)
        }
    };
    Certificate {
        class,
        settle_ms,
        report,
    }
}

struct Trial<'a> {
    owner_side: &'a NfsClient,
    holder_side: &'a NfsClient,
    broker_uid: u32,
    flood_rounds: u32,
    file: FileHandle,
    ok: bool,
    report: String,
}

impl Trial<'_> {
    fn note(&mut self, ok: bool, what: &str) {
        self.ok &= ok;
        let _ = writeln!(self.report, "{} {what}", if ok { "ok  " } else { "FAIL" });
    }

    fn holder(&self, token: Token) -> Credential {
        data_credential(self.broker_uid, token)
    }

    async fn write(&self, token: Token) -> Result<(), NfsError> {
        let data = Bytes::from_static(&[0x5a; 512]);
        let stable = Stable::UNSTABLE;
        self.holder_side
            .write(self.holder(token), &self.file, 0, &data, stable)
            .await
            .map(|_| ())
    }

    async fn set(&self, credential: Credential, attributes: SetAttributes) -> Result<(), NfsError> {
        self.owner_side
            .setattr(credential, &self.file, attributes)
            .await
    }

    async fn swap(&self, token: Token) -> Result<(), NfsError> {
        let group = SetAttributes {
            gid: Some(token.gid()),
            ..SetAttributes::default()
        };
        self.set(claimant(self.broker_uid, token), group).await
    }

    /// Notes whether something was done, or refused with ACCES or PERM, as it must be. A call
    /// without an answer proves nothing and ends the trials.
    fn expect(
        &mut self,
        done: bool,
        what: &str,
        result: Result<(), NfsError>,
    ) -> Result<(), NfsError> {
        let answer = match &result {
            Ok(()) => "done".to_owned(),
            Err(NfsError::Status { status, .. }) => status.to_string(),
            Err(_) => return result,
        };
        let refused = result
            .as_ref()
            .err()
            .and_then(NfsError::status)
            .is_some_and(|status| matches!(status, Status::NFS3ERR_ACCES | Status::NFS3ERR_PERM));
        let good = if done { result.is_ok() } else { refused };
        self.note(good, &format!("{what}: {answer}"));
        Ok(())
    }

    /// The grant/deny matrix, then the flood. Gives the latest landing seen.
    async fn run(&mut self) -> Result<Duration, NfsError> {
        let found = self
            .owner_side
            .getattr(claimant(self.broker_uid, OLD), &self.file)
            .await?;
        let kept = (found.uid, found.gid, found.mode) == (self.broker_uid, OLD.gid(), DISK_MODE);
        let facts = format!(
            "owner {}, group {:#x}, mode {:o}",
            found.uid, found.gid, found.mode
        );
        self.note(
            kept,
            &format!("the server keeps owner, group and mode as given: {facts}"),
        );

        let result = self.write(OLD).await;
        self.expect(true, "the token's holder writes", result)?;
        let result = self.write(NEW).await;
        self.expect(false, "another token's holder is refused", result)?;
        let result = self.swap(NEW).await;
        self.expect(true, "the broker moves the file to another token", result)?;
        let result = self.write(OLD).await;
        self.expect(false, "the old token's holder is refused", result)?;
        let result = self.write(NEW).await;
        self.expect(true, "the new token's holder writes", result)?;

        let group = SetAttributes {
            gid: Some(OLD.gid()),
            ..SetAttributes::default()
        };
        let mode = SetAttributes {
            mode: Some(0o666),
            ..SetAttributes::default()
        };
        for (who, credential) in [
            ("a holder", self.holder(NEW)),
            ("an old holder", self.holder(OLD)),
            (
                "root (export with root_squash)",
                Credential { uid: 0, gid: 0 },
            ),
        ] {
            let result = self.set(credential, group).await;
            self.expect(false, &format!("{who} cannot change the group"), result)?;
            let result = self.set(credential, mode).await;
            self.expect(false, &format!("{who} cannot change the mode"), result)?;
        }

        let data = Bytes::from_static(&[0x5a; 512]);
        let holder = self.holder(NEW);
        let stable = Stable::UNSTABLE;
        let wrote = self
            .holder_side
            .write(holder, &self.file, 0, &data, stable)
            .await?;
        let committed = self.holder_side.commit(holder, &self.file).await?;
        let same = wrote.verifier == committed.verifier;
        self.note(same, "WRITE and COMMIT carry the same verifier");
        if !self.ok {
            return Ok(Duration::ZERO);
        }
        let lag = self.flood().await?;
        self.note(
            true,
            &format!(
                "{} swaps under load: the last old WRITE was answered {lag:?} after",
                self.flood_rounds
            ),
        );
        Ok(lag)
    }

    /// Swaps while the old token's holder writes as fast as it can; gives the longest time from
    /// the swap's answer to an old WRITE's answer of "done".
    async fn flood(&mut self) -> Result<Duration, NfsError> {
        let mut longest = Duration::ZERO;
        let mut old = NEW;
        for round in 0..self.flood_rounds {
            let new = if round % 2 == 0 { OLD } else { NEW };
            let credential = self.holder(old);
            let data = Bytes::from(vec![round as u8; 64 << 10]);
            let mut offset = 0;
            let mut next = || {
                offset = (offset + data.len() as u64) % (4 << 20);
                self.holder_side
                    .write(credential, &self.file, offset, &data, Stable::UNSTABLE)
            };
            let mut flood = FuturesUnordered::new();
            (0..FLOOD_IN_FLIGHT).for_each(|_| flood.push(next()));
            // The server is busy once a full turn has been answered.
            for _ in 0..FLOOD_IN_FLIGHT {
                if let Some(answer) = flood.next().await {
                    answer?;
                }
                flood.push(next());
            }
            let swap = self.swap(new);
            tokio::pin!(swap);
            let mut swapped: Option<Instant> = None;
            while !flood.is_empty() {
                tokio::select! {
                    answer = &mut swap, if swapped.is_none() => {
                        answer?;
                        swapped = Some(Instant::now());
                    }
                    Some(answer) = flood.next() => {
                        match (answer, swapped) {
                            (Ok(_), Some(at)) => longest = longest.max(at.elapsed()),
                            (Err(error), _) if error.status().is_none() => return Err(error),
                            _ => {}
                        }
                        if swapped.is_none_or(|at| at.elapsed() < FLOOD_AFTER) {
                            flood.push(next());
                        }
                    }
                }
            }
            old = new;
        }
        Ok(longest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_whose_writes_land_too_late_has_no_fence_and_the_report_says_why() {
        let good = certificate(true, Duration::from_millis(108), String::new());
        assert_eq!((good.class, good.settle_ms), (FenceClass::GidToken, 1_080));
        assert_eq!(good.report, "");

        let slowest = certificate(true, Duration::from_secs(60), String::new());
        assert_eq!(
            (slowest.class, slowest.settle_ms),
            (FenceClass::GidToken, SETTLE_MS_MAX)
        );

        let late = certificate(true, Duration::from_secs(61), "ok   a trial\n".into());
        assert_eq!(
            (late.class, late.settle_ms),
            (FenceClass::None, SETTLE_MS_MAX)
        );
        assert!(
            late.report.starts_with("ok   a trial\nFAIL "),
            "{}",
            late.report
        );
        assert!(late.report.contains("610000 ms"), "{}", late.report);

        let lax = certificate(false, Duration::ZERO, String::new());
        assert_eq!((lax.class, lax.settle_ms), (FenceClass::None, 1_000));
    }
}
