//! Memory channels between monitors as processes: each takes the announced other, and nobody else.

mod common;

use common::kvm;
use common::process::{LEASE, Process, incoming, machine_file, ticket};
use proto::monitor::{MonitorStatus, Phase, SendMigrationRequest};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::Code;

/// A running source in `directory`.
async fn source(directory: &std::path::Path) -> Process {
    let file = machine_file(directory, 32, 10, 0);
    let mut source = Process::start(directory, "source", &file, "").await;
    source.run(5, LEASE).await.unwrap();
    source
}

/// A destination of migration `id` in `directory`, told of nobody yet.
async fn destination(directory: &std::path::Path, id: u64) -> Process {
    let file = incoming(&machine_file(directory, 32, 10, 0), id, 6);
    Process::start(directory, &format!("destination-{id}"), &file, "").await
}

/// The failure of the source's attempt, which leaves its machine running.
async fn failure(source: &mut Process, id: u64) -> String {
    let failed = |status: &MonitorStatus| {
        status
            .migration
            .as_ref()
            .is_some_and(|migration| migration.migration_id == id && !migration.failure.is_empty())
    };
    let status = source.wait("refused", failed).await;
    assert_eq!(status.phase(), Phase::Running);
    assert!(!status.said_quiet);
    status.migration.unwrap().failure
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_takes_the_announced_source_and_nobody_else() {
    if !kvm("a_destination_takes_the_announced_source_and_nobody_else") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut source = source(directory.path()).await;
    let mut destination = destination(directory.path(), 4).await;
    let there = destination.status().await;
    let ours = source.status().await.channel_fingerprint;
    assert_eq!((there.channel_fingerprint.len(), ours.len()), (32, 32));
    assert_ne!(there.channel_fingerprint, ours, "each draws its own");

    // Nobody was announced: the right ticket helps no one.
    source.send_to_monitor(4, &there).await.unwrap();
    let why = failure(&mut source, 4).await;
    assert!(why.contains("channel 0"), "{why}");

    let refused = destination.expect(5, ours.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound, "another migration");
    let refused = destination.expect(4, ours[1..].to_vec()).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "31 bytes");
    let refused = source.expect(4, ours.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound, "it receives nothing");

    // Another one is announced: the source is a stranger now.
    destination.expect(4, vec![9; 32]).await.unwrap();
    let request = SendMigrationRequest {
        // The credentials are migration 4's; the monitor would not begin migration 4 again.
        migration_id: 7,
        addresses: there.incoming_addresses.clone(),
        ticket: ticket(4).to_vec(),
        destination_fingerprint: there.channel_fingerprint.clone(),
        ..Default::default()
    };
    source.client.send_migration(request).await.unwrap();
    let why = failure(&mut source, 7).await;
    assert!(why.contains("AccessDenied"), "{why}");

    // Words in clear, and a connection that says nothing: both while the right source comes.
    let address = &there.incoming_addresses[0];
    let mut plain = TcpStream::connect(address).await.unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let _silent = TcpStream::connect(address).await.unwrap();

    destination.expect(4, ours.clone()).await.unwrap();
    destination.expect(4, ours.clone()).await.unwrap();
    assert_eq!(destination.status().await.phase(), Phase::Incoming);
    let mut answer = Vec::new();
    // A reset is a refusal as well.
    let _ = plain.read_to_end(&mut answer).await;
    assert!(answer.is_empty() || answer[0] == 21, "{answer:?}");

    // Its attempt at migration 4 is over, so another monitor has to come: announced in its place.
    let elsewhere = tempfile::tempdir().unwrap();
    let mut second = self::source(elsewhere.path()).await;
    second.send_to(4, &mut destination).await.unwrap();
    destination.wait_phase(Phase::Complete).await;
    let refused = destination.expect(4, ours).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    let same = second.status().await.channel_fingerprint;
    destination.expect(4, same).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_sends_nothing_to_a_destination_with_another_certificate() {
    if !kvm("a_source_sends_nothing_to_a_destination_with_another_certificate") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut source = source(directory.path()).await;
    let mut lured = destination(directory.path(), 1).await;
    let mut meant = destination(directory.path(), 2).await;
    let ours = source.status().await.channel_fingerprint;
    lured.expect(1, ours).await.unwrap();
    let mut there = lured.status().await;
    there.channel_fingerprint = Vec::new();
    let refused = source.send_to_monitor(1, &there).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "no fingerprint");
    there.channel_fingerprint = meant.status().await.channel_fingerprint;
    source.send_to_monitor(1, &there).await.unwrap();
    let why = failure(&mut source, 1).await;
    assert!(why.contains("did not prove"), "{why}");
    let status = lured.status().await;
    assert_eq!(status.phase(), Phase::Incoming);
    assert_eq!(status.migration.unwrap().sent_bytes, 0, "not a byte");

    source.send_to(2, &mut meant).await.unwrap();
    meant.wait_phase(Phase::Complete).await;
}
