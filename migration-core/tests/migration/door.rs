//! Who may connect: wrong tickets, garbage, slow callers, and a relay that falls silent.

use crate::fake::{Fake, Guest};
use crate::rig::{Attempt, Cut, credentials, network};
use async_trait::async_trait;
use migration_core::{BoxStream, Connector, Credentials, SendError, SendOptions, Ticket, send};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Notify, watch};

/// Passes bytes on in both directions until told to stall; then it holds the connections and passes nothing.
pub struct Relay {
    pub to: Arc<dyn Connector>,
    pub stall: Arc<Notify>,
}

#[async_trait]
impl Connector for Relay {
    async fn connect(&self, channel: u16) -> io::Result<BoxStream> {
        let mut far = self.to.connect(channel).await?;
        let (near, mut middle) = tokio::io::duplex(64 << 10);
        let stall = Arc::clone(&self.stall);
        tokio::spawn(async move {
            tokio::select! {
                _ = tokio::io::copy_bidirectional(&mut middle, &mut far) => {}
                () = stall.notified() => std::future::pending().await,
            }
        });
        Ok(Box::new(near))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_are_turned_away_and_the_right_source_does_not_notice() {
    let (source, sink) = (Fake::filled(21), Fake::new());
    let _guest = Guest::start(&source, 100, Duration::from_micros(500));
    let (caller, port, _) = network(0, Cut::Never);
    let mut attempt = Attempt::new(Arc::clone(&caller) as Arc<dyn Connector>, port, 2);
    attempt.send_options.bandwidth_max_bytes_s = 16 << 20;
    let mut status = attempt.source_status.subscribe();

    let strangers = tokio::spawn(async move {
        // Before, at the beginning, and in the middle of the copy.
        for pages in [0, 1, 1000] {
            status
                .wait_for(|status| status.pages >= pages)
                .await
                .unwrap();
            let wrong = Credentials {
                ticket: Ticket([1; 32]),
                ..credentials()
            };
            let failed = stranger(&caller, wrong).await;
            assert!(
                matches!(&failed, SendError::Destination(why) if why.contains("ticket")),
                "a wrong ticket: {failed}"
            );
            if pages > 0 {
                let failed = stranger(&caller, credentials()).await;
                assert!(
                    matches!(&failed, SendError::Destination(why) if why.contains("used")),
                    "the ticket again: {failed}"
                );
            }
            let mut garbage = caller.connect(0).await.unwrap();
            garbage.write_all(&[0x47; 4096]).await.unwrap();
            let mut answer = Vec::new();
            garbage.read_to_end(&mut answer).await.unwrap();
            assert_eq!(&answer[..4], b"BTNM", "a reason, and then the end");
        }
        // One who connects and says nothing is only a handshake that runs out.
        caller.connect(0).await.unwrap()
    });
    let outcome = attempt.run(&source, &sink).await;
    strangers.await.unwrap();
    assert!(outcome.source.is_ok(), "{:?}", outcome.source.err());
    assert!(outcome.destination.is_ok());
    assert_eq!(source.difference(&sink), None);
}

/// Someone else's attempt; it fails without touching the machine it has.
async fn stranger(caller: &Arc<crate::rig::Caller>, credentials: Credentials) -> SendError {
    let machine = Fake::new();
    let (status, _) = watch::channel(Default::default());
    let caller = Arc::clone(caller);
    let failed = send(
        caller,
        credentials,
        Arc::clone(&machine),
        SendOptions {
            channels: 2,
            ..SendOptions::default()
        },
        status,
        Default::default(),
    )
    .await
    .unwrap_err();
    assert!(!failed.said_quiet && !failed.machine_stopped && machine.is_running());
    failed.cause
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_whose_source_never_comes_ends() {
    let (_caller, port, _) = network(0, Cut::Never);
    let (status, _) = watch::channel(Default::default());
    let options = migration_core::ReceiveOptions {
        source_timeout: Duration::from_millis(50),
        ..Default::default()
    };
    let result = migration_core::receive(
        port,
        credentials(),
        Fake::new(),
        options,
        status,
        Default::default(),
    )
    .await;
    let error = result.unwrap_err();
    assert!(
        matches!(
            error,
            migration_core::ReceiveError::NoSource {
                migration_id: 77,
                ..
            }
        ),
        "{error}"
    );
}
