//! Compiles the wire contracts with protox (a protobuf compiler in Rust: nothing to install).

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["monitor.proto", "broker.proto", "peer.proto", "admin.proto"];
    let files: Vec<String> = files.iter().map(|file| format!("proto/{file}")).collect();
    for file in &files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(&files, ["proto"])?;
    tonic_prost_build::configure()
        // What `-o json` prints is the wire's own objects, under the same names; monitors' status
        // rides in heartbeats the same way.
        .type_attribute(
            ".baton.admin.v1",
            "#[derive(serde::Serialize, serde::Deserialize)]",
        )
        .type_attribute(
            ".baton.monitor.v1",
            "#[derive(serde::Serialize, serde::Deserialize)]",
        )
        .compile_fds(descriptors)?;
    Ok(())
}
