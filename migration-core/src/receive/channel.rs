//! One connection of the destination: a task that reads, a thread that writes memory, a task that answers.

use super::intake::{Arrived, Intake};
use crate::error::ReceiveError;
use crate::frame::{Frame, Header, Kind};
use crate::machine::MemorySink;
use crate::wire::{FrameReader, FrameWriter, WireError};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// Frames read ahead of the thread that writes memory.
const READ_AHEAD: usize = 2;

/// Answers that wait to be sent at most: a round has one.
const ANSWERS_MAX: usize = 8;

/// What a channel reports, and which channel it is.
pub type Report = (u16, Result<Arrived, ReceiveError>);

/// The driver's end of a channel; dropping it ends the answers with a close.
pub struct Channel {
    pub answers: mpsc::Sender<Frame>,
}

/// Starts the tasks of an admitted channel.
pub fn start<S: MemorySink + ?Sized>(
    channel: u16,
    halves: (FrameReader, FrameWriter),
    mut intake: Intake<S>,
    reports: mpsc::Sender<Report>,
    heartbeat: Duration,
    tasks: &mut JoinSet<()>,
) -> Channel {
    let (reader, writer) = halves;
    let (answers, outgoing) = mpsc::channel(ANSWERS_MAX);
    let (frames, mut incoming) = mpsc::channel::<Item>(READ_AHEAD);
    let (give_back, buffers) = mpsc::channel(READ_AHEAD + 1);
    tasks.spawn(answer(writer, outgoing, heartbeat));
    tasks.spawn(read(reader, frames, buffers));
    tasks.spawn_blocking(move || {
        while let Some(item) = incoming.blocking_recv() {
            let report = match item {
                Ok((header, buffer)) => {
                    let taken = intake.take(&header, &buffer[..header.length as usize]);
                    let _ = give_back.try_send(buffer);
                    taken
                }
                Err(_) if intake.is_finished() => return,
                Err(error) => Err(error.at_destination(channel)),
            };
            let Some(report) = report.transpose() else {
                continue;
            };
            let over = report.is_err();
            if reports.blocking_send((channel, report)).is_err() || over {
                return;
            }
        }
    });
    Channel { answers }
}

type Item = Result<(Header, Vec<u8>), WireError>;

async fn read(
    mut reader: FrameReader,
    frames: mpsc::Sender<Item>,
    mut buffers: mpsc::Receiver<Vec<u8>>,
) {
    loop {
        let mut buffer = buffers.try_recv().unwrap_or_default();
        let item = reader
            .next(&mut buffer)
            .await
            .map(|header| (header, buffer));
        let over = item.is_err();
        if frames.send(item).await.is_err() {
            // The thread has ended for an error. The source is being told why; closing now, with its bytes
            // unread, would take the reason away. Whoever ends the attempt ends this task.
            return reader.drain().await;
        }
        if over {
            return;
        }
    }
}

async fn answer(mut writer: FrameWriter, mut outgoing: mpsc::Receiver<Frame>, heartbeat: Duration) {
    loop {
        let mut frame = match tokio::time::timeout(heartbeat, outgoing.recv()).await {
            Err(_) => Frame::new(Kind::Heartbeat, &[]),
            Ok(Some(frame)) => frame,
            Ok(None) => return writer.close().await,
        };
        // A source that is gone is noticed by the reader.
        if writer.write(&mut frame).await.is_err() {
            return;
        }
    }
}
