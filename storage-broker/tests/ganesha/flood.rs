//! Takeovers while the old owner writes as fast as it can: with the settle time nothing of it lands late.

use std::sync::Arc;
use std::time::Duration;

use cluster_model::ids::Token;
use cluster_model::settle::SETTLE_MS_MIN;
use futures::future::join_all;
use storage_broker::fence::{
    Claimed, DISK_MODE, claim, claimant, commit_whole, data_credential, verify_group,
};
use storage_broker::nfs::client::SetAttributes;
use storage_broker::nfs::{NfsClient, Stable, Status};
use tokio::sync::Semaphore;

use super::common::BROKER_UID;
use super::server::{Ganesha, with_ganesha};
use super::{block, connect};

/// Disks taken over at the same time, so that waiting out the settle times takes not too long.
const DISKS: u32 = 8;

/// Takeovers of each disk in a landing, and in the long tier: 10,000 of all disks together, an hour.
const ROUNDS: [u32; 2] = [26, 1_250];

/// The flood on each disk.
const CONNECTIONS: usize = 4;
const OUTSTANDING: usize = 4;
const BLOCK: usize = 64 << 10;

/// Each writer of the flood goes on until it has been refused so often.
const REFUSALS: u32 = 10;

#[test]
fn no_write_of_the_old_owner_lands_after_a_takeover_has_settled() {
    with_ganesha(
        "no_write_of_the_old_owner_lands_after_a_takeover_has_settled",
        async |ganesha| {
            let ganesha = &*ganesha;
            let [landing, long] = ROUNDS;
            let rounds = proto::testing::by_tier(landing, long);
            let disks = (0..DISKS).map(|number| takeovers(ganesha, number, rounds));
            let late: u32 = join_all(disks).await.into_iter().sum();
            assert_eq!(late, 0, "late landings in {} takeovers", DISKS * rounds);
        },
    );
}

/// Takes one disk over again and again; how many blocks were not the new owner's in the end.
async fn takeovers(ganesha: &Ganesha, number: u32, rounds: u32) -> u32 {
    let client = connect(ganesha).await;
    let path = format!("disk{number}");
    let first = Token(1);
    let attributes = SetAttributes {
        mode: Some(DISK_MODE),
        gid: Some(first.gid()),
        size_bytes: None,
    };
    let owner = claimant(BROKER_UID, first);
    let file = client
        .create(owner, client.root(), &path, attributes)
        .await
        .unwrap();
    let disk = Claimed {
        path,
        client: client.clone(),
        file,
        broker_uid: BROKER_UID,
    };
    let flooders = join_all((0..CONNECTIONS).map(|_| connect(ganesha))).await;
    let mut late = 0;
    for round in 0..rounds {
        let (old, new) = (Token(1 + round), Token(2 + round));
        let written = Arc::new(Semaphore::new(0));
        let flood: Vec<_> = flooders
            .iter()
            .flat_map(|flooder| (0..OUTSTANDING).map(move |_| flooder))
            .map(|flooder| tokio::spawn(flood(flooder.clone(), disk.clone(), old, written.clone())))
            .collect();
        // The server is busy once a full turn has been written.
        let turn = (CONNECTIONS * OUTSTANDING) as u32;
        drop(written.acquire_many(turn).await.unwrap());

        let files = std::slice::from_ref(&disk);
        claim(files, new).await.unwrap();
        tokio::time::sleep(Duration::from_millis(u64::from(SETTLE_MS_MIN))).await;
        verify_group(files, new).await.unwrap();
        commit_whole(files, new).await.unwrap();
        let mine = block(round as u8 % 0x80, BLOCK);
        let holder = data_credential(BROKER_UID, new);
        client
            .write(holder, &disk.file, 0, &mine, Stable::UNSTABLE)
            .await
            .unwrap();
        for writer in flood {
            writer.await.unwrap();
        }
        let read = client.read(holder, &disk.file, 0, BLOCK as u32).await;
        late += u32::from(read.unwrap().data != mine);
    }
    late
}

/// Writes the same block again and again under a token, until it is refused for good.
async fn flood(client: NfsClient, disk: Claimed, token: Token, written: Arc<Semaphore>) {
    let holder = data_credential(BROKER_UID, token);
    let data = block(0xaa, BLOCK);
    let mut refusals = 0;
    while refusals < REFUSALS {
        match client
            .write(holder, &disk.file, 0, &data, Stable::UNSTABLE)
            .await
        {
            Ok(_) => {
                assert_eq!(refusals, 0, "a refused token is never accepted again");
                written.add_permits(1);
            }
            Err(error) => {
                assert_eq!(error.status(), Some(Status::NFS3ERR_ACCES), "{error}");
                refusals += 1;
            }
        }
    }
}
